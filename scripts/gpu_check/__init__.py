"""What a person with a GPU runs: `scripts/gpu_check.sh`.

It uses the arms of `scripts.bench`, so that its table has the same columns as that of `bench train`.
"""
