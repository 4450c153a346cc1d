"""The data sets GPLQ is developed and tested on, and the resumable way to read any data set."""

from .imagenet_folder import ImageNetFolder
from .mnist5k import MNIST5k
from .mnist_scenes import MNISTScenes
from .resumable import ResumableSampler, SeededDataset
from .transforms import LoadImageOrFail

__all__ = [
    'ImageNetFolder',
    'LoadImageOrFail',
    'MNIST5k',
    'MNISTScenes',
    'ResumableSampler',
    'SeededDataset',
]
