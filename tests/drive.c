/* Makes a folder behave like a FUSE mount such as Google Drive's on Colab: below $DRIVE there are no locks, no links, no
   modes and no folder syncs. cc -shared -fPIC -o drive.so drive.c -ldl; LD_PRELOAD=drive.so DRIVE=/folder program */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int is_below(const char *path) {
    const char *root = getenv("DRIVE");
    char real[PATH_MAX];
    return root && realpath(path, real) && strncmp(real, root, strlen(root)) == 0;
}

static int is_open_below(int fd) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return is_below(link);
}

#define REFUSE(condition, code) if (condition) { errno = code; return -1; }
#define NEXT(name, ...) ((int (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

int flock(int fd, int how) {
    REFUSE(is_open_below(fd), ENOTSUP)
    return NEXT("flock", int, int)(fd, how);
}

int fsync(int fd) {
    struct stat about;
    REFUSE(is_open_below(fd) && fstat(fd, &about) == 0 && S_ISDIR(about.st_mode), EINVAL)
    return NEXT("fsync", int)(fd);
}

int link(const char *old, const char *new) {
    REFUSE(is_below(old), EPERM)
    return NEXT("link", const char *, const char *)(old, new);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    REFUSE(is_below(old), EPERM)
    return NEXT("linkat", int, const char *, int, const char *, int)(from, old, to, new, flags);
}

int chmod(const char *path, mode_t mode) {
    REFUSE(is_below(path), EPERM)
    return NEXT("chmod", const char *, mode_t)(path, mode);
}
