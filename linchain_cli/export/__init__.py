"""What a trained chain can become: a merged checkpoint, a plain LoRA, a model card; and what can become a
chain."""
