"""Chain adapters as a library: put them into a model, take them out, save, load, fold, merge.

It knows nothing of recipes, data or training and works on any `torch.nn.Module` with linear layers, and on
transformers' routed experts.
"""

from linchain_cli.chain.combine import sum_error, weighted_sum
from linchain_cli.chain.experts import ChainExperts, is_transposed
from linchain_cli.chain.files import (
    Adapter,
    ChainTensors,
    adapter_files,
    adapter_of,
    attach,
    load_adapter,
    load_tensors,
    named_tensors,
    save_adapter,
    with_depth,
)
from linchain_cli.chain.fold import find_siblings, folded
from linchain_cli.chain.init import initial_gain
from linchain_cli.chain.inject import (
    ChainConfig,
    adapter_kind,
    detach,
    disabled,
    drops,
    inject,
    merge,
    set_enabled,
)
from linchain_cli.chain.layer import (
    Chain,
    ChainLinear,
    chain_layers,
    collapse,
    delta_weight,
    fold_into_a,
    linear_shape,
)
from linchain_cli.chain.shapes import MatrixShape, carriers, misfit, parameter_count, parameter_name
from linchain_cli.chain.targets import Coverage, Matches, coverage, match_modules, refuse_shared
