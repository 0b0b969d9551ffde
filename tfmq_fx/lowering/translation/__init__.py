"""What turns graphs into another engine's operators: the walk, ATen's names, the types at the interface."""
