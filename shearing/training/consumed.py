"""Which sequences were consumed: one bit each, kept by every rank from what it was really given."""

import numpy as np


class SequenceRepeatedError(RuntimeError):
    """A sequence came a second time within one epoch: data would be trained on twice."""


class ConsumedSequences:
    """A bitmap a domain for its current epoch, and how many epochs lie behind it.

    It is a second, independent account: draw counts say what was planned, the bitmaps what arrived.
    12 million sequences take 1.5 MB.
    """

    def __init__(self, sequences: dict[str, int]) -> None:
        self.sequences = sequences
        self.bits: dict[str, dict[int, np.ndarray]] = {domain: {} for domain in sequences}

    def add(self, domain: str, epoch: int, sequence_id: int) -> None:
        """Mark one sequence. Raises SequenceRepeatedError if this rank had it before in this epoch."""
        bitmap = self._bitmap(domain, epoch)
        byte, mask = sequence_id // 8, 1 << (sequence_id % 8)
        if bitmap[byte] & mask:
            raise SequenceRepeatedError(f"domain {domain}: sequence {sequence_id} came twice in epoch {epoch}")
        bitmap[byte] |= mask

    def check(self, domain: str, merged: dict[str, np.ndarray], drawn: int) -> None:
        """Compare the bitmaps of all ranks together with the planned count.

        Raises SequenceRepeatedError where they differ: a sequence was lost, or given to two ranks.
        """
        bitmaps = [bitmap for name, bitmap in merged.items() if name.rpartition("/")[0] == domain]
        seen = sum(int(np.bitwise_count(bitmap).sum()) for bitmap in bitmaps)
        if seen != drawn:
            raise SequenceRepeatedError(f"domain {domain}: {drawn} sequences were planned and {seen} consumed once each")

    def tensors(self) -> dict[str, np.ndarray]:
        """Bitmaps by `domain/epoch`, uint8 [ceil(sequences / 8)]."""
        return {f"{d}/{epoch}": bitmap for d, epochs in self.bits.items() for epoch, bitmap in epochs.items()}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        self.bits = {domain: {} for domain in self.sequences}
        for name, bitmap in tensors.items():
            domain, _, epoch = name.rpartition("/")
            self.bits[domain][int(epoch)] = bitmap.copy()

    def _bitmap(self, domain: str, epoch: int) -> np.ndarray:
        epochs = self.bits[domain]
        if epoch not in epochs:
            epochs[epoch] = np.zeros(-(-self.sequences[domain] // 8), dtype=np.uint8)
        return epochs[epoch]
