"""Base models: finding and loading them, and running the parts of them that are needed.

files, hub         hub ids, directories and .gguf files → a checkpoint directory and its weight files
hashing            what tells one base from another
config, limits     what a checkpoint says of its model, and what that can read
tokenizer          its tokenizer
gguf, packed       weights in fewer bits → the ones that they stand for
portable           configuration files that older readers read alike
loading, quiet     models in any precision, without transformers' remarks
classifier         a base with a head for classes or a number
checkpoint, names  weight files tensor by tensor, and module paths against their keys
buffers            memory for one block after another
fast               how forwards are replaced, tried and put back
attention, varlen  attention for CPUs, and rows without padding
flat_rows, flat_attention  rows one behind the other, some of whose tokens several share
rope               rotary embeddings whose frequencies follow a batch
products, int8     float32 products by the faster library, and weights in 8 bit
head               a model in two halves: up to the last hidden states, and from there to the logits
logits             logits at chosen positions of a plain forward pass
"""
