from __future__ import annotations

import pytest

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.request import Request
from lmserve.runtime.interface import PromptImage
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_request


def image(start: int, end: int, content: str = "a") -> PromptImage:
    return PromptImage(start, end, content, "")


def compute(kv: KVCacheManager, request: Request, num_tokens: int | None = None) -> None:
    """As if steps had computed the request up to ``num_tokens``."""
    before = request.num_computed_tokens
    request.num_computed_tokens = num_tokens or request.num_tokens
    kv.register_computed(request, before)


def computed_request(kv: KVCacheManager, num_tokens: int, name: str = "first") -> Request:
    request = make_request(num_tokens, name=name)
    assert kv.admit(request)
    compute(kv, request)
    return request


def test_admission_gives_blocks_for_all_known_tokens() -> None:
    kv = KVCacheManager(8, 4)
    request = make_request(9)
    request.output_token_ids += [1, 2, 3, 4]
    assert kv.admit(request)
    assert request.block_table == [0, 1, 2, 3]
    assert request.num_computed_tokens == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_shared"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (20, 3)]
)
def test_a_prefix_is_shared_up_to_the_last_token_but_one(num_tokens: int, num_shared: int) -> None:
    kv = KVCacheManager(16, 4)
    first = computed_request(kv, 12)
    second = make_request(num_tokens, name="second")
    assert kv.admit(second)
    assert second.block_table[:num_shared] == first.block_table[:num_shared]
    assert set(second.block_table[num_shared:]).isdisjoint(first.block_table)
    assert second.num_computed_tokens == 4 * num_shared


def test_a_block_is_found_only_once_it_is_computed_and_full() -> None:
    kv = KVCacheManager(16, 4)
    first = make_request(12)
    assert kv.admit(first)
    for num_computed, num_shared in ((3, 0), (7, 1), (8, 2)):
        compute(kv, first, num_computed)
        other = make_request(13, name="other")
        assert kv.admit(other)
        assert other.num_computed_tokens == 4 * num_shared
        kv.free(other)


@pytest.mark.parametrize(("num_reported", "num_shared"), [(0, 0), (3, 0), (4, 1), (11, 2), (12, 3)])
def test_who_reports_prompt_logprobs_shares_no_more_than_is_reported(num_reported: int, num_shared: int) -> None:
    kv = KVCacheManager(16, 4)
    first = computed_request(kv, 13)
    second = make_request(13, name="second", sampling=SamplingParams(max_tokens=1, prompt_logprobs=0))
    second.num_prompt_logprobs = num_reported
    assert kv.admit(second)
    assert second.block_table[:num_shared] == first.block_table[:num_shared]
    assert second.num_computed_tokens == 4 * num_shared
    compute(kv, second)
    kv.check_integrity([first, second])


def test_output_tokens_are_found_too() -> None:
    kv = KVCacheManager(16, 4)
    first = computed_request(kv, 6)
    first.output_token_ids += [6, 7, 8]
    assert kv.grow(first)
    compute(kv, first, 8)
    second = make_request(9, name="second")
    assert kv.admit(second)
    assert second.num_computed_tokens == 8


def test_freed_blocks_are_found_until_they_are_needed() -> None:
    kv = KVCacheManager(4, 4)
    kv.free(computed_request(kv, 12))
    again = make_request(13)
    assert kv.admit(again)
    assert again.num_computed_tokens == 12
    kv.free(again)
    other = make_request(8, first_token=20)
    assert kv.admit(other)
    kv.free(other)
    again = make_request(13)
    assert kv.admit(again)
    assert again.num_computed_tokens == 8, "the leaf was reused, its chain was not"


def test_cached_blocks_are_not_counted_twice() -> None:
    """A free block that is to be shared cannot be handed out as a new one as well."""
    kv = KVCacheManager(4, 4)
    kv.free(computed_request(kv, 8))
    request = make_request(17)
    assert not kv.admit(request)
    assert kv.num_free_blocks == 4
    assert request.block_table == []
    assert kv.admit(make_request(16))


def test_spare_blocks_are_left() -> None:
    kv = KVCacheManager(4, 4)
    assert not kv.admit(make_request(12), num_spare=2)
    assert kv.num_free_blocks == 4
    assert kv.admit(make_request(12), num_spare=1)


def test_growth_takes_a_block_when_it_has_to() -> None:
    kv = KVCacheManager(2, 4)
    request = computed_request(kv, 4)
    assert kv.grow(request)
    assert request.block_table == [0]
    request.output_token_ids += [1]
    assert kv.grow(request)
    assert request.block_table == [0, 1]
    request.output_token_ids += [1, 1, 1, 1]
    assert not kv.grow(request)
    assert request.block_table == [0, 1]


def test_a_prefix_is_pending_while_a_running_request_computes_it() -> None:
    kv = KVCacheManager(16, 4)
    first, second = make_request(12), make_request(12, name="second")
    assert not kv.prefix_is_pending(second)
    assert kv.admit(first)
    assert kv.prefix_is_pending(second)
    compute(kv, first, 4)
    assert kv.prefix_is_pending(second), "now it waits for the second block"
    compute(kv, first, 8)
    assert not kv.prefix_is_pending(second), "the third block holds its last token, which it has to compute itself"
    assert not kv.prefix_is_pending(make_request(12, first_token=1))
    kv.check_integrity([first])


@pytest.mark.parametrize(
    ("others", "num_shared"),
    [
        ((image(6, 10), image(13, 15, "b")), 5),  # the same
        ((image(6, 10), image(13, 15, "c")), 3),
        ((image(6, 10), image(14, 15, "b")), 3),
        ((image(6, 10),), 3),
        ((image(6, 10, "b"), image(13, 15, "b")), 1),
        ((image(7, 10), image(13, 15, "b")), 1),
        ((image(13, 15, "b"),), 1),
        ((), 1),
        ((image(3, 4), image(6, 10), image(13, 15, "b")), 0),
        ((image(6, 10), image(13, 15, "b"), image(20, 21, "c")), 5),  # in the block that is not shared anyway
    ],
)
def test_a_prefix_is_shared_up_to_the_first_image_that_is_another(
    others: tuple[PromptImage, ...], num_shared: int
) -> None:
    kv = KVCacheManager(32, 4)
    first = make_request(21, images=(image(6, 10), image(13, 15, "b")))
    second = make_request(21, name="second", images=others)
    assert kv.admit(first)
    assert kv.prefix_is_pending(second) == (num_shared > 0), "nobody waits for another one's image"
    compute(kv, first)
    assert kv.admit(second)
    assert second.num_computed_tokens == 4 * num_shared
    assert second.block_table[:num_shared] == first.block_table[:num_shared]


def test_output_behind_an_image_is_shared_with_those_who_have_seen_it() -> None:
    kv = KVCacheManager(32, 4)
    first = make_request(6, images=(image(1, 3),))
    assert kv.admit(first)
    compute(kv, first)
    first.output_token_ids += [6, 7, 8]
    assert kv.grow(first)
    compute(kv, first, 8)
    for content, num_computed in (("a", 8), ("b", 0)):
        second = make_request(9, name=content, images=(image(1, 3, content),))
        assert kv.admit(second)
        assert second.num_computed_tokens == num_computed


def test_nobody_waits_for_one_that_is_gone() -> None:
    kv = KVCacheManager(16, 4)
    first, second = make_request(12), make_request(12, name="second")
    assert kv.admit(first)
    assert kv.prefix_is_pending(second)
    kv.free(first)
    assert not kv.prefix_is_pending(second)
    kv.check_integrity([])


def test_one_who_computes_the_same_does_not_end_the_waiting_for_another() -> None:
    kv = KVCacheManager(16, 4)
    first, twin, third = make_request(12), make_request(12, name="twin"), make_request(12, name="third")
    assert kv.admit(first)
    assert kv.admit(twin)
    kv.free(twin)
    assert kv.prefix_is_pending(third)
    kv.check_integrity([first])


def test_uncomputed_contents_are_never_found() -> None:
    kv = KVCacheManager(16, 4)
    first = make_request(12)
    assert kv.admit(first)
    compute(kv, first, 6)
    kv.free(first)
    second = make_request(12)
    assert kv.admit(second)
    assert second.num_computed_tokens == 4


def test_requests_of_different_roots_share_nothing() -> None:
    kv = KVCacheManager(16, 4)
    computed_request(kv, 12)
    for root, num_shared in ((b"", 8), (b"other", 0)):
        request = make_request(12)
        request.cache_root = root
        assert not kv.prefix_is_pending(request)
        assert kv.admit(request)
        assert request.num_computed_tokens == num_shared


def test_integrity_check_wants_every_table() -> None:
    kv = KVCacheManager(4, 4)
    request = computed_request(kv, 8)
    kv.check_integrity([request])
    with pytest.raises(IntegrityError):
        kv.check_integrity([])


def test_integrity_check_sees_who_is_waited_for_in_vain() -> None:
    kv = KVCacheManager(4, 4)
    request = make_request(8)
    assert kv.admit(request)
    kv._pool.release(request.block_table)
    with pytest.raises(IntegrityError, match="does not run"):
        kv.check_integrity([])
