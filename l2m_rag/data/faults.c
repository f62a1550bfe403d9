/* Counts what a process writes below one folder, and lets the N-th such call fail or be its last.

   Loaded with LD_PRELOAD by `l2m bench faults`; see bench_faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, BROKEN };

static char under[PATH_MAX];
static size_t length;
static long at, seen;
static int fault;
static char watched[65536];

void faults_arm(const char *folder, long number, int kind) {
    snprintf(under, sizeof under, "%s", folder);
    length = strlen(under);
    at = number;
    seen = 0;
    fault = kind;
}

long faults_seen(void) { return seen; }

static int below(const char *path) { return length && path && strncmp(path, under, length) == 0; }
static int held(int file) { return file >= 0 && file < (int)sizeof watched && watched[file]; }
static int hold(int file, const char *path) {
    if (file >= 0 && file < (int)sizeof watched) watched[file] = below(path);
    return file;
}

static int strikes(void) {
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (fault == KILL && number == at) kill(getpid(), SIGKILL);
    if (fault == FULL && number >= at) { errno = ENOSPC; return 1; }
    if (fault == BROKEN && number == at) { errno = EIO; return 1; }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { MODE(flags) REAL(int, open, const char *, int, ...); return hold(real(path, flags, mode), path); }
int open64(const char *path, int flags, ...) { MODE(flags) REAL(int, open64, const char *, int, ...); return hold(real(path, flags, mode), path); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) REAL(int, openat, int, const char *, int, ...); return hold(real(folder, path, flags, mode), path); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) REAL(int, openat64, int, const char *, int, ...); return hold(real(folder, path, flags, mode), path); }
int close(int file) { REAL(int, close, int); hold(file, NULL); return real(file); }
FILE *fopen(const char *path, const char *how) { REAL(FILE *, fopen, const char *, const char *); FILE *made = real(path, how); if (made) hold(fileno(made), path); return made; }
FILE *fopen64(const char *path, const char *how) { REAL(FILE *, fopen64, const char *, const char *); FILE *made = real(path, how); if (made) hold(fileno(made), path); return made; }
size_t fwrite(const void *from, size_t size, size_t count, FILE *to) { REAL(size_t, fwrite, const void *, size_t, size_t, FILE *); if (held(fileno(to)) && strikes()) return 0; return real(from, size, count, to); }

ssize_t write(int file, const void *from, size_t size) { REAL(ssize_t, write, int, const void *, size_t); if (held(file) && strikes()) return -1; return real(file, from, size); }
ssize_t writev(int file, const struct iovec *parts, int count) { REAL(ssize_t, writev, int, const struct iovec *, int); if (held(file) && strikes()) return -1; return real(file, parts, count); }
ssize_t pwrite(int file, const void *from, size_t size, off_t to) { REAL(ssize_t, pwrite, int, const void *, size_t, off_t); if (held(file) && strikes()) return -1; return real(file, from, size, to); }
ssize_t pwrite64(int file, const void *from, size_t size, off64_t to) { REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t); if (held(file) && strikes()) return -1; return real(file, from, size, to); }
int fsync(int file) { REAL(int, fsync, int); if (held(file) && strikes()) return -1; return real(file); }
int fdatasync(int file) { REAL(int, fdatasync, int); if (held(file) && strikes()) return -1; return real(file); }
int mkdir(const char *path, mode_t mode) { REAL(int, mkdir, const char *, mode_t); if (below(path) && strikes()) return -1; return real(path, mode); }
int rename(const char *from, const char *to) { REAL(int, rename, const char *, const char *); if (below(to) && strikes()) return -1; return real(from, to); }
int renameat(int one, const char *from, int other, const char *to) { REAL(int, renameat, int, const char *, int, const char *); if (below(to) && strikes()) return -1; return real(one, from, other, to); }
int renameat2(int one, const char *from, int other, const char *to, unsigned how) { REAL(int, renameat2, int, const char *, int, const char *, unsigned); if (below(to) && strikes()) return -1; return real(one, from, other, to, how); }
int link(const char *from, const char *to) { REAL(int, link, const char *, const char *); if (below(to) && strikes()) return -1; return real(from, to); }
int linkat(int one, const char *from, int other, const char *to, int how) { REAL(int, linkat, int, const char *, int, const char *, int); if (below(to) && strikes()) return -1; return real(one, from, other, to, how); }
int unlink(const char *path) { REAL(int, unlink, const char *); if (below(path) && fault != FULL && strikes()) return -1; return real(path); }
