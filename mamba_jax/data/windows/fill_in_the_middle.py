"""Fill-in-the-middle: some documents of a window are learnt as prefix, suffix, then the middle.

Bavarian et al. 2022 (arXiv 2207.14255): the order prefix–suffix–middle, applied to what of a
document lies in a window ("context level"), so that no part is torn away by the window's edge. The
cuts fall between tokens, not between characters as there.
"""

import dataclasses
import itertools

import numpy as np

_FEWEST_TOKENS = 8  # of a stretch that is worth cutting in three


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Turns documents around.

    Attributes:
      rate: of all documents of windows, 0 to 1.
      eot_id: begins a document.
      ids: that stand before prefix, suffix and middle.
    """

    rate: float
    eot_id: int
    ids: tuple[int, int, int]

    def __call__(self, window: np.ndarray, seed: int, sample: int) -> np.ndarray:
        """Returns the window with some of its documents turned around, of the same length.

        Each takes three tokens more; so many are left out at the window's end, before what lies
        there is cut in three.

        Args:
          window: int32 (t,), as ``windows`` gives it.
          seed: of the run.
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
            # The same draws for every document, whatever becomes of it.
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
