"""Base models: finding and loading them, and running the parts of them that are needed.

files       hub ids, directories and .gguf files → a checkpoint directory, its hash and its weight files
gguf        .gguf files → checkpoint directories, once
portable    configuration files that older readers read alike
quiet       transformers without its remarks
loading     configurations, tokenizers, models in any precision
checkpoint  weight files tensor by tensor, without loading a model
buffers     memory for one block after another
names       module paths against a checkpoint's keys
attention   attention for CPUs, and rows without padding
head        a model in two halves: up to the last hidden states, and from there to the logits
logits      logits at chosen positions of a plain forward pass
"""
