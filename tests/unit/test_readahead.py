from collections.abc import Iterator

from banger import readahead


def test_few_pieces_are_taken_ahead() -> None:
    """So the memory that a stream takes does not depend on its size."""
    taken = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for piece in [b"x"] * 1000:
            taken += 1
            yield piece

    with readahead.read_ahead(counted()) as arriving:
        for number, _ in enumerate(arriving, 1):
            # in the queue, in the hand of the thread, and being waited for
            assert taken <= number + readahead._AHEAD + 1
    assert taken == 1000
