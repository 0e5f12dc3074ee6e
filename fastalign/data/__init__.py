"""From files to batches: readers, templates, tokenization, sampling, collation."""
