"""How much errors inside a model matter for what it predicts: gradients, and what stands in for them."""
