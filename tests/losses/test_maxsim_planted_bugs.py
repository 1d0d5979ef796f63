"""The checks of test_maxsim_kernels must be able to fail: each of these bugs in the kernels' text is found."""

import ctypes
import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from losses.maxsim import kernels
from tests.losses import emulation
from tests.losses.test_maxsim_kernels import (
    Case,
    check,
    check_gradients,
    chosen_tokens,
    differentiate,
    random_case,
    random_gradient,
    unwritten_memory_is_nan,
)

# Two panels of 64 dimensions, the second one short.
EMBEDDING, DTYPE = 80, torch.bfloat16
SEEDS = range(3)
RELEASE = "if (threadIdx.x % 128 == 0) barrier_arrive(&ring.empty[ring.stage()]);"
# What is wrong: file, text with the wrong part in [[ ]], what stands in its place.
BUGS = {
    "a step's offset in the swizzled row is halved": ("forward_sm90", "[[step % 4 * 32]]", "step % 4 * 16"),
    "a panel's offset is wrong": ("forward_sm90", "[[step / 4 * PANEL_BYTES]]", "step / 4 * BOX_BYTES"),
    "columns past a short tile are not masked, sm90": ("forward_sm90", "if ([[columns < N]])", "false"),
    "all of a lane's columns are masked as its first": ("forward_sm90", "i % 2 + [[shift]] >= columns", "0"),
    "the producer does not wait for an empty stage": (
        "forward_sm90",
        "[[barrier_wait(&ring.empty[ring.stage()], ring.parity() ^ 1);]]",
        "",
    ),
    "consumers do not wait for a full stage": (
        "forward_sm90",
        "[[barrier_wait(&ring.full[ring.stage()], ring.parity());]]",
        "",
    ),
    "a consumer waits for the wrong phase": (
        "forward_sm90",
        "ring.full[ring.stage()], [[ring.parity()]])",
        "ring.turn % 2",
    ),
    "a stage is released before its products are done": (
        "forward_sm90",
        f"[[wgmma_wait(similarity);\n    {RELEASE}]]",
        f"{RELEASE} wgmma_wait(similarity);",
    ),
    "a warpgroup releases no stage": (
        "forward_sm90",
        f"[[wgmma_wait(similarity);\n    {RELEASE}]]",
        "wgmma_wait(similarity);",
    ),
    "a warpgroup without slabs releases stages": (
        "forward_sm90",
        "[[if (first_slab >= work.end_slab) return;]]",
        "",
    ),
    "a stage waits for warpgroups without slabs": (
        "forward_sm90",
        "[[min(WARPGROUPS, divide_up(work.end_slab - work.first_slab, 4))]]",
        "WARPGROUPS",
    ),
    "fewer bytes are expected than come": (
        "forward_sm90",
        "[[boxes * PANELS * BOX_BYTES]]",
        "boxes * BOX_BYTES",
    ),
    "more bytes are expected than come": (
        "forward_sm90",
        "[[boxes * PANELS * BOX_BYTES]]",
        "boxes * BOX_BYTES * PANELS + 16",
    ),
    "barriers are used before they are initialised": (
        "forward_sm90",
        "    }\n    [[__syncthreads();]]\n    if (threadIdx.x / 128 == WARPGROUPS)",
        "",
    ),
    "products are not committed": ("forward_sm90", "[[wgmma_commit();]]", ""),
    "a panel is not fenced before its products": ("forward_sm90", "[[wgmma_fence();]]", ""),
    "the last of a lane's equal maxima wins, sm90": (
        "forward_sm90",
        "[[similarity[i] <= own.value[half]]] ?",
        "similarity[i] < own.value[half]",
    ),
    "the last tile's equal maximum wins, sm90": (
        "forward_sm90",
        "[[!(own.value[half] <= best.value[half])]]",
        "own.value[half] >= best.value[half]",
    ),
    "columns past a short tile are not masked, sm80": ("forward", "if ([[column < columns]])", "true"),
    "a tile is read before it is whole": (
        "forward",
        "[[copy_async_wait<STAGES - 2>();]]",
        "copy_async_wait<STAGES - 1>();",
    ),
    "a tile is overwritten while others read it": ("forward", "[[__syncthreads();]]", ""),
    "a tile is loaded into the wrong stage": ("forward", "[[(tile + STAGES - 1) % STAGES]]", "tile % STAGES"),
    "the last of a lane's equal maxima wins, sm80": (
        "forward",
        "if ([[!(value <= best[slab].value[half])]])",
        "value >= best[slab].value[half]",
    ),
    "each lane keeps its own of equal maxima": (
        "epilogue",
        "earlier = [[other_value == value && (u32)other_token < (u32)token]];",
        "false",
    ),
    "the last of two lanes' equal maxima wins": (
        "epilogue",
        "[[(u32)other_token < (u32)token]]",
        "(u32)other_token > (u32)token",
    ),
    "rows past a short slab are scored": ("epilogue", "[[row < slab.rows && length > 0]]", "length > 0"),
    "an unscored document has a score": ("epilogue", "[[row < slab.rows && length > 0]]", "slab.rows > row"),
    "NaN is lost within a lane, sm90": (
        "forward_sm90",
        "[[larger(own.value[half], similarity[i])]]",
        "fmaxf(own.value[half], similarity[i])",
    ),
    "NaN is lost between tiles, sm90": (
        "forward_sm90",
        "[[larger(best.value[half], own.value[half])]]",
        "fmaxf(best.value[half], own.value[half])",
    ),
    "NaN is lost within a lane, sm80": (
        "forward",
        "[[larger(best[slab].value[half], value)]]",
        "fmaxf(best[slab].value[half], value)",
    ),
    "NaN is lost between lanes": ("epilogue", "[[other_value != other_value]]", "false"),
    "after NaN a column past the end wins": ("epilogue", "[[token = min(token, length - 1);]]", ""),
    "documents are cut into parts that miss the last": (
        "epilogue",
        "documents.count * [[(part + 1)]] / parts",
        "part + 1 - (part == parts - 1)",
    ),
    "a copy keeps holes": ("index", "[[positions[chunk / CHUNKS]]]", "(u16)(chunk / CHUNKS)"),
    "holes are not noticed": ("index", "[[moved |= place != token;]]", ""),
    "the sum of slabs forgets a lane": ("index", "slabs += __shfl_sync(~0u, end, [[31]])", "30"),
    "a query's gradient is of one lane": ("backward", "int distance = [[LANES]]; distance < 32", "32"),
    "half of the documents is forgotten": ("backward", "if ([[half == 1]])", "false"),
    "half of the sums lies over winners in use": (
        "backward",
        "[[__syncthreads();]]  // the last winners",
        "",
    ),
    "winners are staged over those in use": (
        "backward",
        "[[__syncthreads();]]  // the winners staged before",
        "",
    ),
    "winners are used before they are staged": (
        "backward",
        "winner_rows[i] = winner_row;\n        }\n        [[__syncthreads();]]",
        "",
    ),
    "a winner is not looked up among all tokens, queries": (
        "backward",
        "first_of_document + [[document_position(a, first_of_document, winner)]]",
        "winner",
    ),
    "a winner is not looked up among all tokens, documents": (
        "backward",
        "NO_WINNER ? -1 : [[position]] - begin",
        "token[i]",
    ),
    "winners that wait for more are forgotten": ("backward", "[[listed -= added;]]", "listed = 0;"),
    "winners that wait for more stay at their old place": ("backward", "[[listed_rows[lane] = row;]]", ""),
    "a winner is listed at its own lane's place": (
        "backward",
        "listed + [[__popc(ballot & ((1u << lane) - 1))]]",
        "lane",
    ),
    "winners are added before others have listed theirs": (
        "backward",
        "[[__syncwarp();]]\n        int added = 0;",
        "",
    ),
    "a pair without a gradient is added, queries": (
        "backward",
        "[[winner != NO_WINNER && weight != 0]]",
        "winner != NO_WINNER",
    ),
    "a pair without a gradient is added, documents": ("backward", "if ([[weight != 0]]) source", "true"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels with all bugs, of which the global `planted` chooses one: one compilation, not one a bug."""
    sources = tmp_path_factory.mktemp("planted") / "sources"
    shutil.copytree(emulation.SOURCES, sources)
    for number, (file, marked, instead) in enumerate(BUGS.values(), start=1):
        before, after = marked.split("[[", 1)[0], marked.rsplit("]]", 1)[1]
        right = marked[len(before) + 2 : len(marked) - len(after) - 2]
        path = sources / f"{file}.cuh"
        text = path.read_text()
        assert text.count(before + right + after) == 1, f"{before + right + after!r} is not once in {file}.cuh"
        if right.rstrip().endswith(";"):
            either = f"if (planted == {number}) {{ {instead} }} else {{ {right} }}"
        else:
            either = f"(planted == {number} ? {instead} : {right})"
        path.write_text(text.replace(before + right + after, before + either + after))
    path = sources / "types.cuh"
    path.write_text('extern "C" { int planted = 0; }\n' + path.read_text())
    return emulation.build(sources.parent, kernels.constants(EMBEDDING, DTYPE), sources)


def cases() -> list[Case]:
    """All pairs with vectors of which none are equal, documents of a few vectors each in both layouts, and more
    documents than a block stages at once."""
    queries: list[int | str] = [17, 3, 0, "holes", 40, 1, *[2] * 25, 33, 1, 2]
    documents: list[int | str] = [300, "holes", 129, 0, 7, *[1, 3] * 15, "odd", 128, 40]
    different = random_case(1, EMBEDDING, DTYPE, queries, documents, longest=(40, 300))
    alike = random_case(2, EMBEDDING, DTYPE, [40, "holes", 17], [300, "holes", 300] * 2, longest=(40, 300))
    of_ten = torch.randint(0, 10, (6, 300), generator=torch.Generator().manual_seed(3))
    vectors = alike.documents[0, :10][of_ten]
    alike = dataclasses.replace(alike, documents=torch.where(alike.document_mask[..., None], vectors, alike.documents))
    many = random_case(4, EMBEDDING, DTYPE, [17, 3], [2, 1] * 150, longest=(17, 2))
    return [alike, dataclasses.replace(alike, candidates=2), many, different]


def check_everything(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError, or RuntimeError from the emulator, if the kernels are wrong in any order of threads."""
    numbers = kernels.constants(EMBEDDING, DTYPE)
    for seed in SEEDS:
        module = emulation.EmulatedModule(library, seed=seed)
        for case, sm90 in itertools.product(cases(), (False, True)):
            program = kernels.Program(module, emulation.tensor_map, numbers, 2, 228 * 1024, sm90)
            monkeypatch.setattr(kernels, "load", lambda *_, program=program: program)
            with unwritten_memory_is_nan():
                check(case)
                check_nan(case)


def check_nan(case: Case) -> None:
    """Texts that are NaN, or one of their tokens, score NaN; with a gradient of 0 they change no gradient."""
    _, winners, index = kernels.forward(*case.sides, case.candidates, save=True)
    gradient = random_gradient(case)
    gradient[:, 0] = gradient[1] = 0
    queries, documents = case.queries.clone(), case.documents.clone()
    queries[1] = documents[:: case.candidates or len(documents)] = float("nan")
    broken = dataclasses.replace(case, queries=queries, documents=documents)
    found = differentiate(broken, gradient, winners, index)
    check_gradients(case, gradient, chosen_tokens(case, winners), found)
    scores = kernels.forward(*broken.sides, case.candidates, save=False)[0]
    assert scores[0, 0].isnan()
    assert scores[1, :3].isnan().all()
    assert scores[0, 1].isfinite()
    chosen_tokens(broken, kernels.forward(*broken.sides, case.candidates, save=True)[1])  # none past the end
    one_token = case.documents.clone()
    one_token[0, min(5, one_token.shape[1] - 1)] = float("nan")  # of the first tile, and a lane that writes no score
    scores = kernels.forward(*dataclasses.replace(case, documents=one_token).sides, case.candidates, save=False)[0]
    assert scores[0, 0].isnan()


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_every_planted_bug_is_found_and_without_one_there_is_nothing_to_find(
    library: Path, monkeypatch: pytest.MonkeyPatch, bug: str | None
) -> None:
    planted = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "planted")
    if bug is None:
        planted.value = 0
        check_everything(library, monkeypatch)
        return
    planted.value = list(BUGS).index(bug) + 1
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(library, monkeypatch)
