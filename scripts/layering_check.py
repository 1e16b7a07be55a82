#!/usr/bin/env python3
"""Checks which folder includes which: base <- scheduler, comm, kernels <- runtime, and no include cycle.

usage: layering_check.py [ROOT]      (ROOT: the repository, by default the one this file is in)

Every problem is one line "file:line: what is wrong"; the exit status is 1 when there is any.
The build enforces the same by targets; this also sees code that the present build does not compile.
"""
import pathlib
import re
import sys

# What a room may include besides itself. A path names a part of a room.
ALLOWED = {
    "base": [],
    "scheduler": ["base"],
    "comm": ["base"],
    "kernels": ["base", "comm/device"],
    "runtime": ["base", "scheduler", "comm", "kernels"],
}
# Users of the rooms: anything may be included, but they are no part of a room.
USERS = ["tests", "benchmarks", "examples", "python"]
SUFFIXES = {".hpp", ".cpp", ".h", ".c", ".cu", ".cuh", ".inl"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def without_comments(text):
    """The text with comments blanked, lines kept; strings are left alone."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)

    def blank(match):
        found = match.group(0)
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return pattern.sub(blank, text)


def sources(root):
    for folder in list(ALLOWED) + USERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield folder, path


def resolve(root, name):
    """The file that "sluice/..." names: a room's file, or a public header of runtime."""
    inner = name.removeprefix("sluice/")
    if inner.split("/")[0] in ALLOWED and "/" in inner:
        return root / inner
    return root / "runtime" / "include" / name


def check(root):
    problems = []
    edges = {}
    count = 0
    for folder, path in sources(root):
        count += 1
        shown = path.relative_to(root)
        for number, line in enumerate(without_comments(path.read_text(encoding="utf-8")).splitlines(), 1):
            found = INCLUDE.match(line)
            if not found:
                continue
            quote, name = found.groups()
            if not name.startswith("sluice/"):
                if quote == '"' and folder in ALLOWED:
                    problems.append(f'{shown}:{number}: "{name}" must be written "sluice/<room>/..."')
                continue
            target = resolve(root, name)
            if not target.is_file():
                problems.append(f"{shown}:{number}: {name} is no file of a room")
                continue
            edges.setdefault(path, []).append((target, number))
            if folder not in ALLOWED:
                continue
            inside = target.relative_to(root).as_posix()
            rooms = [folder] + ALLOWED[folder]
            if not any(inside.startswith(room + "/") for room in rooms):
                problems.append(f"{shown}:{number}: {folder} includes {name}; it may include only {', '.join(rooms)}")
    problems += cycles(root, edges)
    if count == 0:
        problems.append(f"{root}: no sources found")
    return count, problems


def cycles(root, edges):
    """One problem for each include that closes a cycle, found depth first without recursion."""
    problems = []
    state = {}  # 1: on the way, 2: done
    for start in sorted(edges):
        if start in state:
            continue
        state[start] = 1
        way = [(start, iter(edges.get(start, [])))]
        while way:
            node, following = way[-1]
            for target, number in following:
                if state.get(target) == 1:
                    names = [step.relative_to(root).as_posix() for step, _ in way]
                    loop = names[names.index(target.relative_to(root).as_posix()):] + [
                        target.relative_to(root).as_posix()]
                    problems.append(f"{node.relative_to(root)}:{number}: include cycle: {' -> '.join(loop)}")
                elif target not in state:
                    state[target] = 1
                    way.append((target, iter(edges.get(target, []))))
                    break
            else:
                state[node] = 2
                way.pop()
    return problems


def main():
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1] if len(sys.argv) == 2 else pathlib.Path(__file__).parent.parent).resolve()
    count, problems = check(root)
    for problem in problems:
        print(problem)
    print(f"layering: {count} files, {len(problems)} problems", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
