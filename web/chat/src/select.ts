// A part of a cell: whoever looks at it is drawn again when the part changes, not when the rest does.

import { useLayoutEffect, useReducer, useRef } from "preact/hooks";
import type { Cell } from "../../src/cell";

export function usePart<T, P>(cell: Cell<T>, part: (value: T) => P): P {
  const [, redraw] = useReducer((n: number) => n + 1, 0);
  const seen = useRef<P>(undefined as never);
  const pick = useRef(part);
  pick.current = part;
  seen.current = part(cell.value);
  useLayoutEffect(() => cell.watch(() => Object.is(pick.current(cell.value), seen.current) || redraw(undefined as never)), [cell]);
  return seen.current;
}
