"""Parts that hosts share, each one file of MLX: text encoders, tokenizers, the autoencoder, features of time."""
