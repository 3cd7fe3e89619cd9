"""Operations: plain-torch references, and kernels registered over them (``deepseek.registry``)."""
