"""Follow calls by name: the definitions of a source tree that a call of one function may run.

A definition is a function, class or method; a function inside another belongs to the enclosing one. Starting at the
roots, the code of each definition leads to further definitions. Annotations, decorators and local variables do not.

* A name leads to the function or class that the file defines or imports under that name.
* ``self.name`` and ``super().name`` lead to the method or property of the own class or of its base classes.
* ``module.name`` leads to the definition in that module, ``Class.name`` to the method of that class.
* ``object.name`` leads to the method of the classes that annotate the object; see below.
* ``object.name`` without an annotation leads to every method of that name in a class that the file defines or imports,
  unless lists, dictionaries, sets, strings or every module have such a method (``append``, ``get``, ``forward``).
* ``Class(...)`` also leads to ``__init__``, ``__new__`` and ``__post_init__`` of the class.
* ``object(...)`` leads to ``forward`` and ``__call__`` of the classes that annotate the object.

The annotation of an object is that of a parameter of the same definition, or else of a parameter, variable or attribute
of that name in the same file, or else in a file that it imports a definition from. For ``a.b`` the name is ``b``.
``Any`` and ``object`` are no annotations.

Only definitions in the given folders count, and only they are followed; stubs, with a body of ``...``, do not. Values
are not inferred. A method may therefore be found that never runs, and a call is missed if the class of its object is
neither annotated, defined nor imported.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
NOT_RUN = {"annotation", "returns", "decorator_list", "type_params"}
"""Fields of syntax nodes that a call does not run."""
CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
CALL_METHODS = ("forward", "__call__")
COMMON = {name for kind in (list, dict, set, str) for name in dir(kind)} | set(CALL_METHODS)
"""Names of methods that say nothing about the class of an object."""
UNTYPED = {"Any", "object"}


@dataclass
class Module:
    """A parsed file.

    Attributes:
        file: Path of the file, relative to the source folder.
        definitions: Functions and classes at the top level, by name.
        imports: Full dotted names of what the file imports, by local name.
        annotated: Names in the annotations of variables, parameters and attributes, by the annotated name.
    """

    file: str
    definitions: dict[str, FunctionNode | ast.ClassDef]
    imports: dict[str, str]
    annotated: dict[str, set[str]]


class Definition(NamedTuple):
    """A function, class or method.

    Attributes:
        module: Dotted name of its module.
        name: Name, with the class in front for a method.
        node: Its syntax.
    """

    module: str
    name: str
    node: FunctionNode | ast.ClassDef


class CallPaths:
    """The definitions of a source tree, and the calls between them.

    Args:
        source: Folder of the package.
        within: Folders and files of the package in which calls are followed, relative to ``source``; empty for all.
    """

    def __init__(self, source: Path, within: Sequence[str] = ()) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted(source.rglob("*.py")):
            relative = path.relative_to(source)
            parts = [source.name, *relative.with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = read_module(path, str(relative))
        self.followed = {
            name
            for name, module in self.modules.items()
            if not within or any(Path(module.file).is_relative_to(part) for part in within)
        }

    def find(self, root: str) -> Definition:
        """Return the definition called ``name`` or ``Class.name`` in the followed folders.

        Raises:
            ValueError: There is none, or more than one.
        """
        found = [
            Definition(module, name, node)
            for module in sorted(self.followed)
            for name, node in _qualified(self.modules[module])
            if name == root
        ]
        if len(found) != 1:
            places = ", ".join(self.modules[one.module].file for one in found) or "no file"
            raise ValueError(f"the root {root} must be defined once in the given folders, found it in {places}")
        return found[0]

    def reachable(self, roots: Sequence[str]) -> list[Definition]:
        """Return the roots and every definition that their code leads to, by file and name."""
        waiting = [self.find(root) for root in roots]
        found: dict[tuple[str, str], Definition] = {}
        while waiting:
            definition = waiting.pop()
            key = definition.module, definition.name
            if definition.module in self.followed and key not in found and not _is_stub(definition.node):
                found[key] = definition
                if isinstance(definition.node, FunctionNode):
                    waiting.extend(self._targets(definition))
        return [found[key] for key in sorted(found)]

    def _targets(self, definition: Definition) -> Iterator[Definition]:
        local = _local_names(definition.node)
        for node in _code(definition.node):
            if isinstance(node, ast.Name) and node.id not in local:
                if isinstance(target := self._resolve(definition.module, node.id), Definition):
                    yield target
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield from self._attribute(definition, node, local)
            elif isinstance(node, ast.Call):
                yield from self._called(definition, node.func)

    def _attribute(self, definition: Definition, node: ast.Attribute, local: set[str]) -> Iterator[Definition]:
        module, owner = definition.module, definition.name.rpartition(".")[0]
        match node.value:
            case ast.Name(id="self" | "cls") if owner:
                if own := self._methods(self._resolve(module, owner), node.attr):
                    yield from own
                    return
            case ast.Call(func=ast.Name(id="super")):
                for base in self._bases(self._resolve(module, owner)):
                    yield from self._methods(base, node.attr)
                return
            case ast.Name(id=name) if name not in local:
                target = self._resolve(module, name)
                if isinstance(target, str):
                    member = self._resolve(target, node.attr)
                    yield from [member] if isinstance(member, Definition) else []
                    return
                if target is not None:
                    yield from self._methods(target, node.attr)
                    return
        classes = self._classes_of(definition, node.value)
        if classes is None:
            classes = [] if node.attr in COMMON else self._in_sight(module)
        for target in classes:
            yield from self._methods(target, node.attr)

    def _called(self, definition: Definition, function: ast.expr) -> Iterator[Definition]:
        if isinstance(function, ast.Name) and (target := self._resolve(definition.module, function.id)) is not None:
            for constructor in CONSTRUCTORS:
                yield from self._methods(target, constructor)
            return
        for target in self._classes_of(definition, function) or []:
            for method in CALL_METHODS:
                yield from self._methods(target, method)

    def _classes_of(self, definition: Definition, node: ast.expr) -> list[Definition] | None:
        """Return the classes of the tree that annotate an object; None if nothing annotates it."""
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
        if isinstance(node, ast.Name):
            parameters: dict[str, set[str]] = {}
            for argument in [child for child in ast.walk(definition.node) if isinstance(child, ast.arg)]:
                _note(parameters, argument.arg, argument.annotation)
            if name in parameters:
                return self._resolve_all(definition.module, parameters[name])
        modules = [definition.module, *(target.module for target in self._in_sight(definition.module))]
        for module in dict.fromkeys(modules):
            if name in self.modules[module].annotated:
                return self._resolve_all(module, self.modules[module].annotated[name])
        return None

    def _in_sight(self, module: str) -> list[Definition]:
        """Return the definitions that a module has or imports."""
        return self._resolve_all(module, [*self.modules[module].definitions, *self.modules[module].imports])

    def _resolve_all(self, module: str, names: Iterable[str]) -> list[Definition]:
        targets = [self._resolve(module, name) for name in sorted(names)]
        return [target for target in targets if isinstance(target, Definition)]

    def _resolve(self, module: str, name: str) -> Definition | str | None:
        """Return what a name of a module stands for: a definition, the name of a module, or None for anything else."""
        while module in self.modules:
            if node := self.modules[module].definitions.get(name):
                return Definition(module, name, node)
            imported = self.modules[module].imports.get(name)
            if imported is None or imported in self.modules:
                return imported
            if (source := imported.rpartition(".")[0]) == module:
                return None
            module, name = source, imported.rpartition(".")[2]
        return None

    def _bases(self, target: Definition | str | None) -> list[Definition]:
        if not isinstance(target, Definition) or not isinstance(target.node, ast.ClassDef):
            return []
        return self._resolve_all(target.module, [base.id for base in target.node.bases if isinstance(base, ast.Name)])

    def _methods(self, target: Definition | str | None, name: str) -> list[Definition]:
        """Return the method of a class, or of its nearest base classes that have it; nothing for other targets."""
        if not isinstance(target, Definition) or not isinstance(target.node, ast.ClassDef):
            return []
        for node in target.node.body:
            if isinstance(node, FunctionNode) and node.name == name:
                return [Definition(target.module, f"{target.name}.{name}", node)]
        return [method for base in self._bases(target) for method in self._methods(base, name)]


def read_module(path: Path, file: str) -> Module:
    """Parse a file; ``file`` is its name in the results."""
    tree = ast.parse(path.read_text())
    module = Module(file, {}, {}, {})
    module.definitions.update({node.name: node for node in tree.body if isinstance(node, FunctionNode | ast.ClassDef)})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module.imports.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            module.imports.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.arg):
            _note(module.annotated, node.arg, node.annotation)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
            name = node.target.id if isinstance(node.target, ast.Name) else node.target.attr
            _note(module.annotated, name, node.annotation)
    return module


def _note(annotated: dict[str, set[str]], name: str, annotation: ast.expr | None) -> None:
    """Add the names in an annotation, which may be quoted, unless it is missing or untyped."""
    if annotation is None:
        return
    quoted = [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant)]
    parsed = [annotation, *(ast.parse(text, mode="eval") for text in quoted if isinstance(text, str))]
    names = {node.id for part in parsed for node in ast.walk(part) if isinstance(node, ast.Name)}
    if not names <= UNTYPED:
        annotated.setdefault(name, set()).update(names)


def _qualified(module: Module) -> Iterator[tuple[str, FunctionNode | ast.ClassDef]]:
    for name, node in module.definitions.items():
        yield name, node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, FunctionNode):
                    yield f"{name}.{member.name}", member


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a definition is called."""
    for field, value in ast.iter_fields(node):
        if field not in NOT_RUN:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield child
                    yield from _code(child)


def _is_stub(node: FunctionNode | ast.ClassDef) -> bool:
    last = node.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...


def _local_names(node: ast.AST) -> set[str]:
    stored = {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return stored | {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
