"""Training: streams and a schedule on `transformers.Trainer`."""
