// The browser's own <dialog>: it keeps the focus inside, closes with Esc, and gives the focus back.

import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { Icon } from "./icons";
import { t } from "./text";

export function Dialog({ title, onClose, children, wide }: { title: string; onClose: () => void; children: ComponentChildren; wide?: boolean }) {
  const host = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const dialog = host.current!;
    const before = document.activeElement as HTMLElement | null;
    if (!dialog.open) dialog.showModal();
    return () => before?.focus?.();
  }, []);
  return (
    <dialog
      ref={host}
      class={wide ? "dialog wide" : "dialog"}
      aria-label={title}
      onClose={onClose}
      onClick={(e) => e.target === host.current && onClose()}
    >
      <div class="dialog-in">
        <header>
          <h2>{title}</h2>
          <button type="button" class="icon-button" onClick={onClose} aria-label={t("Close")}>
            <Icon name="close" />
          </button>
        </header>
        {children}
      </div>
    </dialog>
  );
}
