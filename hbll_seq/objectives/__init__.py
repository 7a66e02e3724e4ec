"""Training objectives: modules around a model whose forward returns one loss."""
