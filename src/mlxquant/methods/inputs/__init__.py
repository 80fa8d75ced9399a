"""Methods for inputs: activation tables over time, bits a layer and timestep, the post-GELU shift."""
