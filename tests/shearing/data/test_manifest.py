import numpy as np
import pytest
from tiny_corpus import split_of_shards

from shearing.data.manifest import SequencePlaces, load_manifest
from shearing.storage import open_store


class TestSequencePlaces:
    @pytest.mark.parametrize(
        "shards", [((0, 9),), ((0, 4), (4, 5)), ((1000, 3), (0, 4), (10, 1)), ((7, 2), (2**40, 3))]
    )
    def test_places_are_dense(self, shards):
        # catches bitmaps as long as the largest id, and two ids on one place, where ids have gaps between shards
        ids = np.sort(np.concatenate([np.arange(first, first + n) for first, n in shards]))
        shuffled = np.random.default_rng(0).permutation(len(ids))
        places = SequencePlaces(split_of_shards(*shards)).of(ids[shuffled])
        assert places.dtype == np.int64
        assert np.array_equal(places, shuffled)

    @pytest.mark.parametrize("stranger", [-1, 0, 9, 14, 103, 2**41])
    def test_refuses_other_ids(self, stranger):
        # catches an id between or beyond shards put on a neighbour's place
        places = SequencePlaces(split_of_shards((100, 3), (10, 4)))
        with pytest.raises(ValueError, match=f"{stranger}.* not all of this split"):
            places.of(np.array([10, stranger]))

    def test_of_nothing(self):
        assert len(SequencePlaces(split_of_shards((0, 3))).of(np.array([], dtype=np.int64))) == 0


def test_unfinished_corpus(tmp_path):
    # catches reading shards of a preparation that was cut short
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json: prepare the corpus first"):
        load_manifest(open_store(str(tmp_path)))
