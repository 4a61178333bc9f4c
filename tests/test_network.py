"""What several GPUs bring, computed: the formulas, their limits, and `lorikit plan --gpus`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.errors import ConfigError
from lorikit.train.distributed import deal
from lorikit.train.network import Links, count_ranks, layers_of
from test_distributed import command


@given(st.integers(2, 1024), st.integers(1, 1 << 34))
def test_a_ring_sends_nearly_twice_the_bytes_however_many_there_are(ranks, size):
    free = Links(ranks, bandwidth=1.0, message=0.0)
    assert size * 1.0 <= free.sum_seconds(size) < 2 * size
    assert free.sum_seconds(size) == pytest.approx(2 * free.gather_seconds(size))
    assert Links(1, 1.0, 1.0).sum_seconds(size) == Links(1, 1.0, 1.0).gather_seconds(size) == 0.0


def test_layers_are_what_the_settings_of_a_model_say(tmp_path):
    values = {"num_hidden_layers": 4, "hidden_size": 10, "vocab_size": 100, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = layers_of(tmp_path, 6000, 2)
    assert (found.count, found.layer, found.rest) == (4, 2000, 4000)
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert layers_of(tmp_path, 6000, 2).rest == 2000
    assert layers_of(tmp_path / "none", 6000, 2).layer == 12000


@pytest.mark.parametrize(("gpus", "nodes"), [(0, None), (-1, 2), (2, 0), (2, -5), (1 << 30, 1)])
def test_counts_that_cannot_be_are_refused(gpus, nodes):
    with pytest.raises(ConfigError, match="give a whole number from 1"):
        count_ranks(gpus, nodes)


def plan(lorikit, tmp_path, *more):
    config = command(tmp_path)[4]
    code, out, said = lorikit("plan", config, "--gpu", "h100", "--json", *more)
    assert code == 0, said
    return json.loads(out)


def test_data_parallel_needs_the_memory_of_one_and_the_time_of_the_heaviest_share(lorikit, tmp_path):
    alone, two = (plan(lorikit, tmp_path, *more) for more in ((), ("--gpus", "2")))
    assert alone["spread"] is None
    assert two["memory"]["parts"]["weights"] == alone["memory"]["parts"]["weights"]
    found = two["spread"]
    assert (found["ranks"], found["sharded"], found["by_layer_bytes"]) == (2, False, 0)
    assert found["sent_bytes"] == 4 * two["adapter_parameters"], "half of it twice"
    assert found["step"] == found["compute"] + found["network"] == two["time"]["step"]
    assert found["compute"] <= alone["time"]["step"]
    assert found["source"] == "computed"


def test_a_sharded_base_takes_less_of_each_gpu_the_more_there_are(lorikit, tmp_path):
    weights = [
        plan(lorikit, tmp_path, "--gpus", n, "--nodes", "2", "--model.device_map", "shard")["memory"]["parts"][
            "weights"
        ]
        for n in ("1", "2", "4")
    ]
    assert weights[0] > weights[1] > weights[2] > 0
    offloaded = plan(lorikit, tmp_path, "--gpus", "8", "--model.device_map", "shard-offload")
    assert offloaded["memory"]["parts"]["weights"] < weights[2]
    assert offloaded["spread"]["by_layer_bytes"] > 0


def test_the_table_says_that_nothing_of_it_was_measured(lorikit, tmp_path):
    code, out, _ = lorikit("plan", command(tmp_path)[4], "--gpu", "h100", "--gpus", "8", "--nodes", "4")
    words = " ".join(out.split())
    assert code == 0 and "GPUs 32 on 4 machines" in words and "times of several GPUs are computed" in words
    code, _, said = lorikit("plan", command(tmp_path)[4], "--gpus", "0")
    assert code == 2 and "--gpus is 0: give a whole number from 1" in said


def test_more_ranks_than_rows_are_no_faster():
    lengths = [10, 20, 30]
    assert max(sum(lengths[k] for k in part) for part in deal(lengths, 3)) == 30
    assert max(sum(lengths[k] for k in part) for part in deal(lengths, 64)) == 30
