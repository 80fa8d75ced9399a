"""Arrays in, arrays out: linear algebra and statistics, no quantization yet."""
