"""Just enough of Thrift's compact protocol to look at a Parquet file's own account of itself before anything is
unpacked. Whatever is damaged is a `ValueError`."""

from typing import Any

_DEEPEST = 24
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12


def read_struct(data: bytes, start: int, end: int | None = None) -> tuple[dict[int, Any], int]:
    """The struct that begins at `start`, its values by field number, and where it ends: before `end` at the latest."""
    reader = _Reader(data, start, len(data) if end is None else min(end, len(data)))
    return reader.struct(0), reader.at


class _Reader:
    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def byte(self) -> int:
        if not 0 <= self.at < self.end:
            raise ValueError("ends in the middle")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number is too long")

    def signed(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skipped(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise ValueError("ends in the middle")
        self.at += count
        return self.data[self.at - count : self.at]

    def struct(self, depth: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while header := self.byte():
            number = number + (header >> 4) if header >> 4 else self.signed()
            kind = header & 0x0F
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self.value(kind, depth + 1)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("is nested too deeply")
        if kind in (_I16, _I32, _I64):
            return self.signed()
        if kind in (_TRUE, _FALSE, _BYTE):
            return self.byte()
        if kind == _DOUBLE:
            return self.skipped(8)
        if kind == _BINARY:
            return self.skipped(self.varint())
        if kind == _STRUCT:
            return self.struct(depth)
        if kind not in (_LIST, _SET):
            raise ValueError(f"holds a value of kind {kind}")
        header = self.byte()
        count = header >> 4 if header >> 4 < 15 else self.varint()
        if count > self.end - self.at:  # every value takes a byte at least
            raise ValueError("ends in the middle")
        return [self.value(header & 0x0F, depth + 1) for _ in range(count)]
