/* A library to preload into a server, for a wrong clock, and for an export root that hangs or fails.
 *
 * FAULTY_CONTROL names a file of two int64. The first is the number of seconds to add to the clock. The second is the
 * fault of calls with paths below FAULTY_ROOT: 0 for none, 1 to wait until the value changes, 2 to fail with EIO. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *control;
static const char *root;

__attribute__((constructor)) static void begin(void) {
    root = getenv("FAULTY_ROOT");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int file = real(getenv("FAULTY_CONTROL"), O_RDONLY);
    control = mmap(NULL, 16, PROT_READ, MAP_SHARED, file, 0);
    close(file);
}

static int fails(const char *path) {
    if (!control || !root || !path || strncmp(path, root, strlen(root))) return 0;
    while (control[1] == 1) usleep(20000);
    if (control[1] != 2) return 0;
    errno = EIO;
    return 1;
}

#define REAL(result, name, ...) result (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, name)

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list more; va_start(more, flags);                            \
        mode_t mode = va_arg(more, mode_t); va_end(more);               \
        REAL(int, #name, const char *, int, ...);                       \
        return fails(path) ? -1 : real(path, flags, mode);              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int at, const char *path, int flags, ...) {                \
        va_list more; va_start(more, flags);                            \
        mode_t mode = va_arg(more, mode_t); va_end(more);               \
        REAL(int, #name, int, const char *, int, ...);                  \
        return fails(path) ? -1 : real(at, path, flags, mode);          \
    }
OPENAT(openat)
OPENAT(openat64)

DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", const char *);
    return fails(path) ? NULL : real(path);
}

#define STAT(name, type)                                                \
    int name(const char *path, struct type *found) {                    \
        REAL(int, #name, const char *, struct type *);                  \
        return fails(path) ? -1 : real(path, found);                    \
    }
STAT(stat, stat)
STAT(lstat, stat)
STAT(stat64, stat64)
STAT(lstat64, stat64)

#define FSTATAT(name, type)                                             \
    int name(int at, const char *path, struct type *found, int flags) { \
        REAL(int, #name, int, const char *, struct type *, int);        \
        return fails(path) ? -1 : real(at, path, found, flags);         \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (!result && control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += control[0];
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int result = real(now, zone);
    if (!result && control) now->tv_sec += control[0];
    return result;
}

time_t time(time_t *at) {
    REAL(time_t, "time", time_t *);
    time_t now = real(NULL) + (control ? control[0] : 0);
    if (at) *at = now;
    return now;
}
