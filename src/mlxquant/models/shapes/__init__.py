"""The embedded picture model: scenes of coloured shapes, their captions, and the adapter that draws them."""
