"""What approximates the Jacobians between two passes of the engine."""
