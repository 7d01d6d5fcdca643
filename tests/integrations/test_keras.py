"""Keras 3 on torch: its optimizers are none of torch's, and its layers know their weights by paths."""

import keras
import numpy as np

import sosd_fast
from sosd_fast.matrices import kind


def model():
    keras.utils.clear_session()  # which gives layers the same names again
    keras.utils.set_random_seed(0)
    layers = keras.layers
    tokens, image = layers.Input((6,), dtype="int32"), layers.Input((8, 8, 3))
    x = layers.Embedding(20, 16)(tokens)
    x = layers.LSTM(8)(layers.MultiHeadAttention(2, 8)(x, x))
    y = layers.Conv2D(5, 3, name="stem")(image)
    y = layers.Conv1D(4, 2)(layers.Reshape((36, 5))(layers.DepthwiseConv2D(1)(y)))
    return keras.Model([tokens, image], layers.Dense(3, name="head")(layers.Concatenate()([x, layers.Flatten()(y)])))


def test_matrices_are_what_the_layers_hold():
    probe = sosd_fast.track(model(), optimizers=[], method="full")
    shapes = {m.name: tuple(m.tensor().shape) for m in probe.matrices}
    attention = {f"multi_head_attention.{part}.kernel": (16, 16) for part in ("key", "query", "value")}
    by_head = {f"multi_head_attention.attention_output.kernel[{i}]": (8, 16) for i in range(2)}
    assert shapes == attention | by_head | {
        "embedding.embeddings": (20, 16),
        "lstm.lstm_cell.kernel": (16, 32),
        "lstm.lstm_cell.recurrent_kernel": (8, 32),
        "stem.kernel": (27, 5),
        "conv1d.kernel": (10, 4),
        "head.kernel": (148, 3),
    }
    kinds = {name: kind(name) for name in shapes}
    assert all(kinds[name] == "attention" for name in attention | by_head)
    assert kinds["embedding.embeddings"] == "embedding" and kinds["head.kernel"] == "head"


def test_a_run_without_the_callback_is_told(caplog):
    net = model()
    net.compile("adam", "mse")
    with sosd_fast.track(net) as probe:
        net.fit([np.ones((4, 6), "int32"), np.ones((4, 8, 8, 3))], np.ones((4, 3)), verbose=0)
    assert probe.step_count == 0
    (said,) = [m for m in caplog.messages if m.startswith("sosd_fast")]
    assert "the weights changed without a step" in said and "pass optimizers=[] and call Probe.step" in said
