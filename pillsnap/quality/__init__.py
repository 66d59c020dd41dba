"""Is a photo good enough? The classes and functions of a ranking model, under one name."""

from pillsnap.quality.pairs.dataset import PairwiseDataset
from pillsnap.quality.pairs.splitter import DataSplitter
from pillsnap.quality.ranking.benchmarks import PerformanceBenchmarks
from pillsnap.quality.ranking.config import TrainingConfig
from pillsnap.quality.ranking.errors import ImageNotFound, OutOfMemory, RatioError, TierError
from pillsnap.quality.ranking.evaluator import Evaluator
from pillsnap.quality.ranking.feature_extractor import DINOv2FeatureExtractor
from pillsnap.quality.ranking.machine import set_seed
from pillsnap.quality.ranking.projector import Projector
from pillsnap.quality.ranking.ranking_model import PairwiseRankingModel
from pillsnap.quality.ranking.trainer import Trainer

__all__ = [
    "DINOv2FeatureExtractor",
    "DataSplitter",
    "Evaluator",
    "ImageNotFound",
    "OutOfMemory",
    "PairwiseDataset",
    "PairwiseRankingModel",
    "PerformanceBenchmarks",
    "Projector",
    "RatioError",
    "TierError",
    "Trainer",
    "TrainingConfig",
    "set_seed",
]
