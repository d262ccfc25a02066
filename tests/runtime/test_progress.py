"""Progress bars: what they say while XLA compiles."""

import jax
import jax.numpy as jnp

from tda.runtime import progress


def test_a_bar_says_compiling_until_its_first_step_is_done(capsys):
    with progress.bar(3, "encode", "batch") as bar:
        assert "compiling" not in capsys.readouterr().err
        jax.jit(lambda x: x * 2 + 1)(jnp.ones(3))
        assert "encode:   0%" in (shown := capsys.readouterr().err) and "compiling" in shown
        bar.update()
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
        bar.refresh()
        shown = capsys.readouterr().err
        assert "1.00/3.00" in shown and "compiling" not in shown
    jax.jit(lambda x: x * 4 + 1)(jnp.ones(3))
    assert "compiling" not in capsys.readouterr().err


def test_hidden_progress_says_nothing(capsys):
    # Inside, a function that would show its own progress does not.
    with progress.hidden(), progress.hidden(False), progress.bar(3, "encode", "batch"):
        jax.jit(lambda x: x * 5 + 1)(jnp.ones(3))
        progress.tell("a note")
    assert capsys.readouterr() == ("", "")
    progress.tell("a note")
    assert capsys.readouterr().out == "a note\n"
