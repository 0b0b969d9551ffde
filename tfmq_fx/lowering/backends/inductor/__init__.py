"""Just in time: Inductor with frozen weights, on our integer kernels or oneDNN's."""
