"""The temporal block and what is indexed by the timestep; equal up to the order of float sums."""
