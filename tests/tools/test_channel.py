"""The channel between host and worker, and how output is cut: properties."""

import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo_jax.tools.worker import Tape, receive, send

messages = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    ),
)


def through(data: bytes, cuts=()) -> dict:
    """What is received where `data` comes in pieces, and then the end."""
    ours, theirs = socket.socketpair()

    def feed():
        last = 0
        for cut in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
            theirs.sendall(data[last:cut])
            last = cut
        theirs.close()

    with ours:
        writer = threading.Thread(target=feed)
        writer.start()
        try:
            return receive(ours, time.monotonic() + 20)
        finally:
            writer.join()


@given(messages, st.lists(st.integers(0, 10**6), max_size=5))
def test_a_message_comes_through_in_whatever_pieces(message, cuts):
    assert through(json.dumps(message).encode() + b"\n", cuts) == message


@given(messages)
def test_send_makes_one_line(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, message)
        data = theirs.recv(1 << 20)
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    assert json.loads(data) == message


@given(st.binary())
def test_anything_else_is_an_error_and_never_a_hang(data):
    try:
        received = through(data)
    except (EOFError, ValueError):  # ended before a whole line; or no JSON
        return
    assert json.loads(data) == received


def test_silence_ends_at_the_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b'{"half": ')
        with pytest.raises(TimeoutError):
            receive(ours, time.monotonic() + 0.05)
        with pytest.raises(TimeoutError):
            receive(ours, time.monotonic() - 1)


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(2, 60))
def test_a_tape_keeps_head_and_tail_and_counts_the_rest(chunks, limit):
    tape = Tape(limit)
    for chunk in chunks:
        tape.add(chunk)
    data = b"".join(chunks)
    text = tape.text()
    assert "\0" not in text
    text.encode()  # valid, whatever the bytes were
    if len(data) <= limit:
        assert text == data.decode(errors="replace").replace("\0", "\ufffd")
        return
    head, tail = data[: limit // 2], data[len(data) - (limit - limit // 2) :]
    note = f"\n... [{len(data) - limit} bytes cut] ...\n"
    whole = (head + note.encode() + tail).decode(errors="replace").replace("\0", "\ufffd")
    assert text == whole
    assert len(tape.head) + len(tape.tail) <= limit + 2 * limit + 50  # memory is bounded
