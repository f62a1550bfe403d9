"""`python -m l2m_rag.cli`, as `accelerate launch -m` needs it."""

from l2m_rag.cli.main import main

main()
