"""The recipe: all that a run is made from. Nothing in here imports torch."""

from linchain_cli.recipe.data import ChatConfig, DataConfig, SourceConfig, TemplateConfig
from linchain_cli.recipe.dotted import within
from linchain_cli.recipe.loading import convert_recipe, dotted_key, load_recipe
from linchain_cli.recipe.schema import (
    AdapterConfig,
    EvaluationConfig,
    LearningRateFactors,
    ModelConfig,
    Recipe,
    TrainingConfig,
    json_schema,
)
