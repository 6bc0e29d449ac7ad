"""Climb: from small proxy runs to the ratio of each language in the training mixture (arXiv 2509.15556).

    proxies.py                    command: trains the proxy runs
      proxy_plan.py               their mixtures
      train_proxies.py            their training
      proxy_folder.py             their results, as they are written
    proxy_table.py                tables of proxy runs, as they are read
    laws/                         laws fitted to such tables; new ones are added there
    validation.py                 cross-validation of laws
    allocate.py                   command: chooses the mixture
      solve.py                    the solvers
      mixture_problem.py          the problem they solve
      constraints.py              constraints on the mixture
      complementarity.py          Newton's method for mixtures within bounds
    allocation_file.py            allocation.json
    report.py                     command: shows an allocation
      plots.py, plot_parts.py     its figures
"""
