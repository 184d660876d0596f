"""Which sequences were consumed: one bit each, kept by every rank from what it was really given."""

import numpy as np

from shearing.data.manifest import SequencePlaces, SplitEntry


class SequenceRepeatedError(RuntimeError):
    """A sequence came a second time within one epoch: data would be trained on twice."""


class ConsumedSequences:
    """A bitmap a domain for its current epoch, and how many epochs lie behind it.

    It is a second, independent account: draw counts say what was planned, the bitmaps what arrived.
    12 million sequences take 1.5 MB.
    """

    def __init__(self, splits: dict[str, SplitEntry]) -> None:
        self.sequences = {domain: split.sequences for domain, split in splits.items()}
        self.places = {domain: SequencePlaces(split) for domain, split in splits.items()}
        self.bits: dict[str, dict[int, np.ndarray]] = {domain: {} for domain in splits}

    def add(self, domain: str, epoch: int, sequence_ids_N: np.ndarray) -> None:
        """Mark sequences. Raises SequenceRepeatedError if this rank had one of them before in this epoch."""
        bitmap = self._bitmap(domain, epoch)
        places_N = self.places[domain].of(sequence_ids_N)
        bytes_N, bits_N = places_N // 8, (1 << (places_N % 8)).astype(np.uint8)
        repeated_N = (bitmap[bytes_N] & bits_N) != 0
        if repeated_N.any() or len(np.unique(places_N)) < len(places_N):
            raise SequenceRepeatedError(f"domain {domain}: {sequence_ids_N.tolist()} hold one that epoch {epoch} had")
        np.bitwise_or.at(bitmap, bytes_N, bits_N)

    def check(self, domain: str, merged: dict[str, np.ndarray], drawn: int) -> None:
        """Compare the bitmaps of all ranks together with the planned count.

        Raises SequenceRepeatedError where they differ: a sequence was lost, or given to two ranks.
        """
        bitmaps = [bitmap for name, bitmap in merged.items() if name.rpartition("/")[0] == domain]
        seen = sum(int(np.bitwise_count(bitmap).sum()) for bitmap in bitmaps)
        if seen != drawn:
            raise SequenceRepeatedError(
                f"domain {domain}: {drawn} sequences were planned and {seen} consumed once each"
            )

    def tensors(self) -> dict[str, np.ndarray]:
        """Bitmaps by `domain/epoch`, uint8 [ceil(sequences / 8)]."""
        return {f"{d}/{epoch}": bitmap for d, epochs in self.bits.items() for epoch, bitmap in epochs.items()}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Put back what `tensors` gave."""
        self.bits = {domain: {} for domain in self.sequences}
        for name, bitmap in tensors.items():
            domain, _, epoch = name.rpartition("/")
            self.bits[domain][int(epoch)] = bitmap.copy()

    def _bitmap(self, domain: str, epoch: int) -> np.ndarray:
        epochs = self.bits[domain]
        if epoch not in epochs:
            epochs[epoch] = np.zeros(-(-self.sequences[domain] // 8), dtype=np.uint8)
        return epochs[epoch]
