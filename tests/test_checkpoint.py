"""What a save withstands."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.checkpoint import Checkpoints, newest_step


def test_ctrl_c_within_a_save_waits_for_its_end(tmp_path, monkeypatch):
    state = {"params": jnp.arange(3.0)}
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        save, close = checkpoints._manager.save, checkpoints._manager.close

        def interrupted(act):
            def call(*arguments, **options):
                signal.raise_signal(signal.SIGINT)
                return act(*arguments, **options)

            return call

        monkeypatch.setattr(checkpoints._manager, "save", interrupted(save))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(4, state, {"seed": 1, "step": 4})
        monkeypatch.setattr(checkpoints._manager, "close", interrupted(close))
    assert newest_step(tmp_path) == 4
    with Checkpoints(tmp_path) as again:
        restored, cursor = again.restore(state, seed=1)
    np.testing.assert_array_equal(restored["params"], [0.0, 1.0, 2.0])
    assert cursor["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
