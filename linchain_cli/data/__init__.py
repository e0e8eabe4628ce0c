"""From a data set to a batch: sources, templates, encoding with supervision masks, batches."""
