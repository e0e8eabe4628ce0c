"""The recipe: all that a run is made from. Nothing in here imports torch."""

from linchain_cli.recipe.data import ChatConfig, DataConfig, SourceConfig, TemplateConfig
from linchain_cli.recipe.loading import load_recipe
from linchain_cli.recipe.schema import (
    AdapterConfig,
    EvaluationConfig,
    LearningRateFactors,
    ModelConfig,
    Recipe,
    TrainingConfig,
    json_schema,
    within,
)
from linchain_cli.shipped import shipped_recipes

__all__ = [
    "AdapterConfig",
    "ChatConfig",
    "DataConfig",
    "EvaluationConfig",
    "LearningRateFactors",
    "ModelConfig",
    "Recipe",
    "SourceConfig",
    "TemplateConfig",
    "TrainingConfig",
    "json_schema",
    "load_recipe",
    "shipped_recipes",
    "within",
]
