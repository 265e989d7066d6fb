"""A small writer of ONNX graphs: nodes by calls, loops as ``Scan``, weights in a file beside them.

Legend: i a factor's inputs, o its outputs.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mamba_jax.errors import need

OPSET, IR_VERSION = 18, 8  # from 2022: runtimes of recent years support it
_ALIGNMENT = 4096  # of a weight in its file, for runtimes that map it into memory
Value = str | np.ndarray | np.generic  # the name of a value, or a constant


class Graph:
    """Nodes in order. A value is known by its name; a loop's body sees those around it."""

    def __init__(self, table: Mapping[str, np.ndarray], around: "Graph | None" = None):
        """Begins.

        Args:
          table: the weights by name, float32.
          around: the graph in which this is the body of a loop.
        """
        self.onnx = need("onnx", "onnx")
        self.table = table
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.weights: dict[str, np.ndarray] = {} if around is None else around.weights
        self.constants: dict[str, Any] = {} if around is None else around.constants
        self._names: dict[str, str] = {}
        self._numbers: itertools.count = itertools.count() if around is None else around._numbers

    def __call__(self, op: str, *inputs: Value, outs: int = 1, **attributes: Any) -> Any:
        """Adds a node.

        Returns:
          The name of its output; a list of names if ``outs`` is above 1.
        """
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        number = next(self._numbers)
        outputs = [f"{op}_{number}" + (f"_{i}" if outs > 1 else "") for i in range(outs)]
        self.nodes.append(self.onnx.helper.make_node(op, names, outputs, outputs[0], **attributes))
        return outputs if outs > 1 else outputs[0]

    def weight(self, name: str) -> str:
        """Returns the name of a weight of the table, unchanged."""
        self.weights.setdefault(name, self.table[name])
        return name

    def factor(self, name: str, rows: slice = slice(None)) -> str:
        """Returns the name of a factor (i, o) made of the table's (o, i), or of some of its rows.

        Transposed here and not by a node, because a runtime would keep both.
        """
        bounds = "" if rows == slice(None) else f"[{rows.start or 0}:{rows.stop or ''}]"
        self.weights.setdefault(f"{name}{bounds}.T", self.table[name][rows].T)
        return f"{name}{bounds}.T"

    def input(self, name: str, dtype: type, *shape: int | str) -> str:
        """Declares an input; named axes are dynamic."""
        self.inputs.append(self._info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: type, *shape: int | str) -> None:
        """Declares what a node gives an output, under this name once ``name_outputs`` is called."""
        self._names[value] = name  # a node that only names it would copy it
        self.outputs.append(self._info(name, dtype, shape))

    def name_outputs(self) -> None:
        """Gives the outputs their names, in every node that makes or reads one."""

        def rename(nodes: Iterable[Any]) -> None:
            for node in nodes:
                for names in (node.input, node.output):
                    names[:] = [self._names.get(name, name) for name in names]
                for attribute in node.attribute:
                    rename(attribute.g.node)

        rename(self.nodes)

    def scan(
        self,
        step: "Callable[[Graph, str, list[str]], tuple[str, ...]]",
        state: str,
        items: Sequence[str],
        axis: int,
    ) -> list[str]:
        """Loops over an axis of ``items``, however long it is; all of float32.

        Args:
          step: adds to a graph what makes of a state and the items' slices, which lack the axis,
            the next state and any outputs.
          state: the first.
          items: what is sliced.
          axis: of the items, and of the stacked outputs.

        Returns:
          The last state, and the outputs stacked.
        """
        body = Graph(self.table, around=self)
        number = next(self._numbers)
        begins = [body.input(f"loop_{number}_{i}", np.float32) for i in range(1 + len(items))]
        ends = step(body, begins[0], begins[1:])
        for name in ends:
            body.output(name, name, np.float32)
        self("Scan", state, *items, outs=len(ends), num_scan_inputs=len(items))
        node, helper = self.nodes[-1], self.onnx.helper
        graph = helper.make_graph(body.nodes, "step", body.inputs, body.outputs)
        attributes = {"body": graph, "scan_input_axes": [axis] * len(items)}
        if len(ends) > 1:
            attributes["scan_output_axes"] = [axis] * (len(ends) - 1)
        node.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
        return list(node.output)

    def _constant(self, value: np.ndarray | np.generic) -> str:
        array = np.asarray(value, order="C")  # not ascontiguousarray: it makes scalars vectors
        name = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        if name not in self.constants:
            tensor = self.onnx.numpy_helper.from_array(array, f"constant_{len(self.constants)}")
            self.constants[name] = tensor
        return self.constants[name].name

    def _info(self, name: str, dtype: type, shape: Sequence[int | str]) -> Any:
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        # Inside a loop, onnx infers the shapes.
        return self.onnx.helper.make_tensor_value_info(name, kind, list(shape) or None)


class WeightsFile:
    """The weights of several graphs, each array once, in a file beside the graphs.

    So graphs do not grow with the model: a Protocol Buffers file is limited to 2 GB.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        path.touch()

    def save(self, graph: Graph, path: pathlib.Path, description: str) -> None:
        """Writes and checks a model of this graph; ``path`` is in the folder of the weights."""
        onnx = graph.onnx
        graph.name_outputs()
        weights = [self._placed(onnx, name, array) for name, array in graph.weights.items()]
        proto = onnx.helper.make_graph(
            graph.nodes,
            path.stem,
            graph.inputs,
            graph.outputs,
            [*weights, *graph.constants.values()],
        )
        model = onnx.helper.make_model(
            proto,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mamba_jax",
            doc_string=description,
        )
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)

    def _placed(self, onnx: Any, name: str, array: np.ndarray) -> Any:
        if name not in self._places:
            with self._path.open("ab") as file:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                place = file.tell()
                file.write(np.ascontiguousarray(array, "<f4").data)
            self._places[name] = place, array.nbytes
        tensor = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=onnx.TensorProto.FLOAT,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        offset, length = self._places[name]
        place = {"location": self._path.name, "offset": offset, "length": length}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor
