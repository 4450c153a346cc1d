"""The training data of a run, and whether a checkpoint stands at a place in it."""

from dataclasses import asdict, dataclass

from torch.utils.data import DataLoader

from ..checkpoint import CheckpointError
from ..distributed import rank_and_world_size


@dataclass(frozen=True)
class TrainingData:
    """What an iteration count means in images; the number of ranks has no part in it.

    Attributes:
        images: Size of the training set.
        batch: Images of an iteration, over all ranks.
        iterations: Iterations of an epoch.
    """

    images: int
    batch: int
    iterations: int

    @classmethod
    def of(cls, dataloader: DataLoader) -> 'TrainingData':
        """That of a rank's data loader."""
        _, world_size = rank_and_world_size()
        batch = dataloader.batch_size * world_size
        return cls(len(dataloader.dataset), batch, len(dataloader))

    def images_in(self, iterations: int) -> int:
        """Images that so many iterations read; one counts again in every epoch."""
        epochs, rest = divmod(iterations, max(self.iterations, 1))
        # The last batch of an epoch may be smaller, or left out.
        of_epoch = min(self.images, self.iterations * self.batch)
        return epochs * of_epoch + min(rest * self.batch, of_epoch)

    def state_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)

    def require_same(self, saved: dict[str, int]) -> None:
        """Refuses to go on elsewhere than where the checkpoint stands.

        Args:
            saved: Of :meth:`state_dict`, from the checkpoint.

        Raises:
            CheckpointError: If the data are others, or dealt out in other batches.
        """
        if saved == self.state_dict():
            return
        _, world_size = rank_and_world_size()
        text = (
            f'the checkpoint was saved amid {saved["images"]} training images in batches of '
            f'{saved["batch"]} over all ranks, this run has {self.images} in batches of '
            f'{self.batch} ({self.batch // world_size} on each of {world_size} rank(s)): '
        )
        if saved['images'] != self.images:
            text += 'resume with the data that the run began with'
        elif saved['batch'] % world_size:
            text += f'resume on a number of ranks that divides {saved["batch"]}'
        elif saved['batch'] != self.batch:
            size = saved['batch'] // world_size
            text += f'resume with --cfg-options train_dataloader.batch_size={size}'
        else:
            text += 'resume with drop_last, and on as many ranks, as the run began with'
        raise CheckpointError(f'{text}, or start a new run in another work dir.')
