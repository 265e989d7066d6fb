"""Fill-in-the-middle: some documents of a window are reordered as prefix, suffix, middle.

Bavarian et al. 2022 (arXiv 2207.14255), in the order prefix–suffix–middle. It is applied to the
part of a document inside a window ("context level"), so that the window's edge separates no parts.
Deviation from the paper: the cuts are between tokens, not between characters.
"""

import dataclasses
import itertools

import numpy as np

_FEWEST_TOKENS = 8  # of a document that is worth cutting in three


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Reorders documents.

    Attributes:
      rate: share of the documents of windows, 0 to 1.
      eot_id: the separator, which begins a document.
      ids: the tokens before prefix, suffix and middle.
    """

    rate: float
    eot_id: int
    ids: tuple[int, int, int]

    def __call__(self, window: np.ndarray, seed: int, sample: int) -> np.ndarray:
        """Returns the window with some of its documents reordered, of the same length.

        Each one takes three more tokens; the same number is dropped at the window's end, before the
        last document is cut in three.

        Args:
          window: int32 (t,), as ``windows`` gives it.
          seed: the run's seed.
          sample: the window's number in the training: other cuts in each epoch.
        """
        rng = np.random.default_rng((seed, sample))
        before, (prefix_id, suffix_id, middle_id) = len(self.ids), self.ids
        starts = np.flatnonzero(window == self.eot_id).tolist()
        edges = sorted({0, *starts, len(window)})
        out, room = [], len(window)
        for start, end in itertools.pairwise(edges):
            head = window[start : start + (start in starts)]
            text = window[start + len(head) : end]
            # The same draws for every document, reordered or not.
            chosen, low, high = rng.random(), *np.sort(rng.random(2))
            whole = text[: max(room - len(head) - before, 0)]
            if chosen < self.rate and len(whole) >= _FEWEST_TOKENS and np.all(whole >= 0):
                first, last = (int(share * (len(whole) + 1)) for share in (low, high))
                out += [head, [prefix_id], whole[:first], [suffix_id], whole[last:], [middle_id]]
                out.append(whole[first:last])
                room -= len(head) + before + len(whole)
            else:
                taken = window[start:end][:room]
                out.append(taken)
                room -= len(taken)
        return np.concatenate(out).astype(np.int32)
