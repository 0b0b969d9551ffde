"""The temporal block and what is indexed by the timestep."""
