"""The kernel's interface, typed. No event loop, no policy.

- `abi`: numbers and structs; `libc`: system calls that the standard library lacks; `limits`: errors that name them;
- `sockets`: those whose other end takes nothing;
- `owned_descriptor`: a descriptor that belongs to an object; `memory`: addresses of buffers, sealed memfds;
- `pagemap`: which pages are present;
- `locked`, `populated`: memory that the kernel fills with zeros before it is registered;
- `region`: memory that can be registered; `region_file`: it as a file; `residency`: what of it has come;
- `sharing`: private memory that becomes shared, so that another process can drop its pages;
- `sigbus`: SIGBUS for pages that are still missing at the end;
- `unserved`: mappings of shared memory that no userfaultfd watches;
- `events`: the 32-byte messages; `userfaultfd`: the descriptor, a method for each ioctl;
- `write_tracker`: which pages were written.
"""
