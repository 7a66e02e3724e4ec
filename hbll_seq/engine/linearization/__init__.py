"""What stands for the Jacobians between two passes of the engine."""
