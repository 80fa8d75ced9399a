"""The pipelines of mflux: its own loader, text encoders, schedulers and decoders; what is ours records its modules."""
