"""Every private name of torch, torchao and Inductor that the package uses."""
