"""Instructions at which lanes meet, in PTX, where the lanes may not all come.

A barrier of the block wants all its threads; a shuffle, a vote, a tensor core's product or a named barrier wants all 32
lanes of the warp. Where a branch sends them different ways, by a mistake of the source or because a compiler copied the
instruction into both arms, a card waits for ever. This follows from the thread's number what may differ between threads
(or lanes), from there which branches may send them different ways, and from there which blocks only some may reach.

What differs: the thread's number and what is computed from it, what is read at an address that differs, what a lane gets
of a product, of a copy's barrier or of an election, and whatever is set more than once, or read, where only some are.
What does not: parameters, the block's number, a vote's result, what all lanes shuffle from one, the number of the warp.
Of more than a warp it is only `bar.sync 0` that is checked: not that all four warps come to a `wgmma`.
"""
import re
from collections import defaultdict

# Of a block, and of a warp.
BLOCK = re.compile(r"(bar|barrier)(\.cta)?\.sync(\.aligned)?(\.all)? 0$")
WARP = re.compile(r"(bar\.warp|bar|barrier|shfl|vote|elect|match|redux|mma|wgmma|ldmatrix|stmatrix|setmaxnreg)\.")

# Without a result.
EFFECT = re.compile(r"(st|red|bar|barrier|fence|membar|cp|bra|ret|exit|trap|call|stmatrix|setmaxnreg|mbarrier\.(init|arrive|inval))\b"
                    r"|wgmma\.(fence|commit|wait)")
# Its result is another in every lane, whatever it was given; memory that may be a lane's own among it.
OWN = re.compile(r"(mma|ldmatrix|wgmma|elect|match|atom|mbarrier|activemask)\b|ld\.(?!global|shared|param|const)")
REGISTER = re.compile(r"%[a-z_]+\d*(?:\.[xyz])?(?:@\d+)?")
THREAD = re.compile(r"%(tid|laneid|warpid|lanemask|clock|globaltimer)")


class Instruction:
    def __init__(self, text):
        self.text = text
        guard, rest = re.match(r"(@!?\S+ )?(.*)", text).groups()
        self.guard = guard and REGISTER.search(guard)[0]
        self.name, _, operands = rest.partition(" ")
        first = re.match(r"\{[^}]*\}|[^,]*", operands)[0]
        self.call = f"{self.name} {operands}"
        self.operands = operands[len(first):].strip(", ").split(", ")
        self.results = [] if EFFECT.match(self.name) else REGISTER.findall(first)
        self.sources = [r for r in REGISTER.findall(operands if not self.results else operands[len(first):]) + [self.guard] if r]


def blocks_of(body):
    """Basic blocks of instructions, and the blocks each may go on to. The last is the end of the kernel; a trap is no way
    there, as no lane goes on after one."""
    blocks, names, scopes, count = [[]], {}, [], 0
    for piece in re.sub(r"//.*", "", body).split(";"):
        piece = " ".join(piece.split())
        while begin := re.match(r"(\$\w+):|[{}]", piece):
            piece = piece[begin.end():].strip()
            if begin[1]:
                blocks += [[]] if blocks[-1] else []
                names[begin[1]] = len(blocks) - 1
            elif begin[0] == "{":
                count += 1
                scopes.append((count, set()))
            else:
                scopes.pop()
        if declared := re.match(r"\.reg \.\w+ (.*)", piece):
            if scopes:
                scopes[-1][1].update(declared[1].split(", "))
            continue
        # The registers of inline assembly have names of their own.
        for number, local in scopes:
            if local:
                piece = re.sub(rf"(?<![%.$\w])({'|'.join(local)})(?![\w.])", rf"%local_\1@{number}", piece)
        if piece and not piece.startswith("."):
            blocks[-1].append(Instruction(piece))
            if re.match(r"(bra|brx|ret|exit|trap)\b", blocks[-1][-1].name):
                blocks.append([])
    end, follow = len(blocks), []
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        kind = last.name.split(".")[0] if last else ""
        to = []
        if kind == "brx":
            raise ValueError(f"not understood: {last.text}")
        if kind == "bra":
            to.append(names[last.text.split()[-1]])
        elif kind == "ret":
            to.append(end)
        if kind not in ("bra", "ret", "exit", "trap") or last.guard:
            to.append(i + 1)
        follow.append(to)
    return blocks + [[]], follow + [[]]


def arms_of(follow):
    """For every block: those that not all who leave it need come through, before all meet again."""
    number = len(follow)
    whole = (1 << number) - 1
    # Sets as bits: the blocks that every way from here to the end goes through.
    after = [whole] * (number - 1) + [1 << (number - 1)]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(number - 1)):
            through = whole
            for to in follow[i]:
                through &= after[to]
            through |= 1 << i
            changed |= through != after[i]
            after[i] = through
    arms = []
    for i in range(number):
        met, seen, ways = after[i] & ~(1 << i), set(), list(follow[i]) if len(follow[i]) > 1 else []
        while ways:
            j = ways.pop()
            if not met >> j & 1 and j not in seen:
                seen.add(j)
                ways += follow[j]
        arms.append(seen)
    return arms


def link(blocks, follow):
    """Tells every instruction which others set what it reads: a register of a loop, or of two arms, has several."""
    sets = defaultdict(list)
    for b, block in enumerate(blocks):
        for i in block:
            i.block = b
            for r in i.results:
                sets[r].append(i)
    several = {r: by for r, by in sets.items() if len(by) > 1}
    bits = {(r, i): 1 << n for n, (r, i) in enumerate((r, i) for r, by in several.items() for i in by)}
    every = {r: sum(bits[r, i] for i in by) for r, by in several.items()}
    # Sets as bits: what is set on some way to the beginning of a block and not set anew.
    coming, changed = [0] * len(blocks), True

    def after(i, here):
        for r in i.results:
            if r in several:
                here = here & (here if i.guard else ~every[r]) | bits[r, i]
        return here

    while changed:
        changed = False
        for b, block in enumerate(blocks):
            here = coming[b]
            for i in block:
                here = after(i, here)
            for to in follow[b]:
                changed |= here & ~coming[to] != 0
                coming[to] |= here
    for b, block in enumerate(blocks):
        here = coming[b]
        for i in block:
            i.shared = any(r in several for r in i.results)
            i.reads = {r: [j for j in sets[r] if r not in several or here & bits[r, j]] for r in i.sources}
            here = after(i, here)


def same_in_warp(i):
    """Whether the result is the same in all lanes although what it is made from is not: the number of the warp, or what
    comes from one lane or from all."""
    if re.match(r"(vote|redux)\.sync", i.name) or (i.name.startswith("shfl.sync.idx") and not REGISTER.match(i.operands[1])):
        return True
    if not re.match(r"(shr|bfe|and)\.", i.name) or not re.fullmatch(r"-?\d+", i.operands[1]):
        return False
    number, known = i.reads.get(i.operands[0]), int(i.operands[1])
    return bool(number) and all(j.operands == ["%tid.x"] for j in number) and (known % 32 == 0 if i.name.startswith("and.") else known >= 5)


def only_some(body, warp):
    """The blocks of a kernel; for each that only some threads of the block (lanes of a warp) may reach, the branch; and
    the instructions whose results may differ between them."""
    blocks, follow = blocks_of(body)
    link(blocks, follow)
    arms = arms_of(follow)
    uses = defaultdict(list)
    for i in (i for block in blocks for i in block):
        for j in (j for by in i.reads.values() for j in by):
            uses[j].append(i)
    reached, work = {}, [i for block in blocks for i in block if OWN.match(i.name) or any(map(THREAD.match, i.sources))]
    differs = set(work)
    while work:
        for i in uses[work.pop()]:
            found = [] if warp and same_in_warp(i) else [i]
            last = i is blocks[i.block][-1] and len(follow[i.block]) > 1
            for b in arms[i.block] if last else []:
                if b not in reached:
                    reached[b] = i
                    found += [j for j in blocks[b] if j.shared or re.match(r"ld\.(global|shared)", j.name)]
            found = [j for j in found if j not in differs]
            differs.update(found)
            work += found
    return blocks, reached, differs


def split(ptx):
    """(kernel, instruction, branch) of every instruction that waits for threads that may have gone another way."""
    found = []
    for name, body in re.findall(r"\.entry (\w+)\([^)]*\)[^{]*\{(.*?)\n\}\n", ptx, re.S):
        for warp in (False, True):
            blocks, reached, differs = only_some(body, warp)
            for b, block in enumerate(blocks):
                for i in block:
                    of_block = bool(BLOCK.match(i.call))
                    if of_block != warp and (of_block or WARP.match(i.name)):
                        if b in reached:
                            found.append((name, i.text, reached[b].text))
                        elif i.guard and differs.intersection(i.reads[i.guard]):
                            found.append((name, i.text, i.guard))
    return found


def seen(body):
    return split(f".visible .entry k()\n{{\n{body}\n\tret;\n}}\n")


# What it must see, and what it must not, each as small as it can be.
LANE = "mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 31; setp.ne.b32 %p1, %r2, 0;"
NUMBER = "mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5;"
SHUFFLE = "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;"
for bad in [
    # `sync(); if thread() == 0 { .. }`, the barrier copied into both arms.
    "mov.u32 %r1, %tid.x; setp.ne.b32 %p1, %r1, 0; @%p1 bra $L_2; st.shared.u32 [%r2], %r1; bar.sync 0; bra.uni $L_3; $L_2: bar.sync 0; $L_3:",
    # A barrier that one warp comes to.
    NUMBER + "setp.ne.b32 %p1, %r2, 0; @%p1 bra $L_1; bar.sync 0; $L_1:",
    # `if lane() == 0 { warp() }`, and lanes that have returned.
    LANE + "@%p1 bra $L_1;" + SHUFFLE + "$L_1:",
    LANE + "@%p1 ret;" + SHUFFLE,
    LANE + f"@%p1 bra $L_1; setp.ne.b32 %p2, %r5, 0; @%p2 bra $L_1; {SHUFFLE} $L_1:",
    # A loop that lanes leave at different times; a choice that lanes made differently; numbers that they read.
    LANE + f"$L_1: {SHUFFLE} add.s32 %r2, %r2, 32; setp.lt.u32 %p2, %r2, 99; @%p2 bra $L_1;",
    LANE + f"mov.b32 %r3, 0; @%p1 bra $L_1; mov.b32 %r3, 1; $L_1: setp.ne.b32 %p2, %r3, 0; @%p2 bra $L_2; {SHUFFLE} $L_2:",
    LANE + f"ld.shared.u32 %r3, [%r2]; setp.ne.b32 %p2, %r3, 0; @%p2 bra $L_2; bar.sync 1, 128; $L_2:",
    # Inline assembly's own registers, a predicate, a product's result.
    LANE + "{ .reg .pred p; setp.ne.u32 p, %r2, 0; @p bar.warp.sync -1; }",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2}, {%r1}, {%r2}, {%f3, %f4}; setp.gt.f32 %p1, %f1, 0f00000000; @%p1 bra $L_1; bar.warp.sync -1; $L_1:",
]:
    assert seen(bad), f"the check of convergence does not see what it should: {bad}"
for good in [
    LANE + "@%p1 bra $L_1; st.shared.u32 [%r2], %r1; $L_1: bar.sync 0;" + SHUFFLE,
    # By the number of the warp, as computed and as shuffled; by a parameter; by a vote; by what all read.
    NUMBER + f"setp.ne.b32 %p1, %r2, 0; @%p1 bra $L_1; {SHUFFLE} bar.sync 1, 128; $L_1:",
    NUMBER + f"shfl.sync.idx.b32 %r3, %r2, 0, 31, -1; setp.ne.b32 %p1, %r3, 0; @%p1 bra $L_1; {SHUFFLE} $L_1:",
    f"ld.param.u32 %r3, [k_0]; setp.ne.b32 %p1, %r3, 0; @%p1 bra $L_1; bar.sync 0; {SHUFFLE} $L_1:",
    LANE + "{ .reg .pred p; setp.ne.u32 p, %r2, 0; vote.sync.ballot.b32 %r3, p, -1; } setp.ne.b32 %p2, %r3, 0; @%p2 bra $L_1; bar.warp.sync -1; $L_1:",
    f"ld.shared.u32 %r3, [%r2]; setp.ne.b32 %p2, %r3, 0; @%p2 bra $L_2; {SHUFFLE} $L_2:",
    # A loop of as many turns in every lane; lanes that wait, each for itself, and then meet; a lane that stops it all.
    f"mov.b32 %r3, 0; $L_1: {SHUFFLE} bar.sync 0; add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 9; @%p1 bra $L_1;",
    "$L_1: { .reg .pred p; mbarrier.try_wait.parity.b64 p, [%r1], %r2; selp.u32 %r3, 1, 0, p; } setp.eq.b32 %p1, %r3, 0; @%p1 bra $L_1; wgmma.fence.sync.aligned;",
    LANE + f"@%p1 bra $L_1; bra.uni $L_2; $L_1: trap; $L_2: {SHUFFLE}",
]:
    assert not seen(good), f"the check of convergence sees what is not there: {seen(good)}"
