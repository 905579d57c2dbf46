/* Stands between a process and the kernel (LD_PRELOAD), for the tests of crashes and power loss.

   It sees what happens to the files whose names begin with VTOKEN_FAULT_STORE, and then
   - counts these calls, and at number VTOKEN_FAULT_AT kills the process instead of carrying it out, with
     VTOKEN_FAULT_HALF after the first half of a write, with VTOKEN_FAULT_ERRNO by failing with that error
     and not by killing;
   - records them in VTOKEN_FAULT_RECORD, in the order in which they happened, along with what is written
     to VTOKEN_FAULT_NOTES (what the process acknowledged).
   A record: kind (1 byte), length of the name (2), offset (8), length of the data (8), name, data. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *store, *notes;
static size_t store_length;
static long kill_at, calls;
static int half, error_number, record = -1, pid;

__attribute__((constructor)) static void begin(void) {
  const char *at = getenv("VTOKEN_FAULT_AT"), *name = getenv("VTOKEN_FAULT_RECORD");
  const char *number = getenv("VTOKEN_FAULT_ERRNO");
  store = getenv("VTOKEN_FAULT_STORE");
  notes = getenv("VTOKEN_FAULT_NOTES");
  store_length = store ? strlen(store) : 0;
  kill_at = at ? atol(at) : 0;
  half = getenv("VTOKEN_FAULT_HALF") != NULL;
  error_number = number ? atoi(number) : 0;
  pid = getpid();
  if (name) record = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void all(struct iovec *parts, int count) {
  for (int i = 0; i < count; i++)
    while (parts[i].iov_len) {
      ssize_t done = syscall(SYS_write, record, parts[i].iov_base, parts[i].iov_len);
      if (done < 0) abort(); /* a record with a hole proves nothing */
      parts[i].iov_base = (char *)parts[i].iov_base + done;
      parts[i].iov_len -= (size_t)done;
    }
}

static void note(char kind, const char *name, uint64_t offset, const void *data, uint64_t length) {
  uint16_t name_length = (uint16_t)strlen(name);
  char head[19];
  if (record < 0) return;
  head[0] = kind;
  memcpy(head + 1, &name_length, 2);
  memcpy(head + 3, &offset, 8);
  memcpy(head + 11, &length, 8);
  struct iovec parts[] = {{head, 19}, {(void *)name, name_length}, {(void *)data, data ? length : 0}};
  all(parts, 3);
}

static int is_store(const char *name) { return store && !strncmp(name, store, store_length); }

/* The directory of the store: syncing it makes names durable. */
static int is_directory(const char *name) {
  size_t length = strlen(name);
  return store && length < store_length && !strncmp(name, store, length) && store[length] == '/' &&
         !strchr(store + length + 1, '/');
}

static int named(int fd, char *name) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, name, PATH_MAX - 1);
  name[length > 0 ? length : 0] = 0;
  return length > 0;
}

/* Counts, and tells whether the call has to fail; does not return where the process has to die. */
static int strikes(int fd, const void *data, size_t length, off_t offset) {
  if (getpid() != pid) return 0;
  if (!kill_at || ++calls != kill_at) return 0;
  if (error_number) {
    note('F', "", 0, NULL, 0); /* proves that it fired */
    return 1;
  }
  if (half && data) syscall(SYS_pwrite64, fd, data, length / 2, offset);
  kill(pid, SIGKILL);
  for (;;) pause();
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define GUARDED(kind, fd, data, length, offset, call) \
  char name[PATH_MAX]; \
  long result; \
  if (!named(fd, name)) return call; \
  int ours = is_store(name), told = notes && !strcmp(name, notes); \
  if (kind == 'S' && is_directory(name)) ours = 1; \
  if (!ours && !told) return call; \
  pthread_mutex_lock(&lock); \
  if (ours && strikes(fd, data, length, offset)) { \
    result = -1; \
    pthread_mutex_unlock(&lock); \
    errno = error_number; \
    return result; \
  } \
  result = call; \
  int failure = errno; \
  if (result >= 0) note(told ? 'N' : kind, name, (uint64_t)(offset), data, data ? (uint64_t)result : 0); \
  pthread_mutex_unlock(&lock); \
  errno = failure; \
  return result

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
  NEXT(pwrite);
  GUARDED('W', fd, data, length, offset, next(fd, data, length, offset));
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
  NEXT(pwrite64);
  GUARDED('W', fd, data, length, offset, next(fd, data, length, offset));
}

/* What SQLite writes has an offset; of what is written without one the place does not matter here. */
ssize_t write(int fd, const void *data, size_t length) {
  NEXT(write);
  GUARDED('W', fd, data, length, 0, next(fd, data, length));
}

int ftruncate(int fd, off_t size) {
  NEXT(ftruncate);
  GUARDED('T', fd, NULL, 0, size, next(fd, size));
}

int ftruncate64(int fd, off64_t size) {
  NEXT(ftruncate64);
  GUARDED('T', fd, NULL, 0, size, next(fd, size));
}

int fsync(int fd) {
  NEXT(fsync);
  GUARDED('S', fd, NULL, 0, 0, next(fd));
}

int fdatasync(int fd) {
  NEXT(fdatasync);
  GUARDED('S', fd, NULL, 0, 0, next(fd));
}

int unlink(const char *name) {
  NEXT(unlink);
  if (!is_store(name)) return next(name);
  pthread_mutex_lock(&lock);
  int refused = strikes(-1, NULL, 0, 0), result = refused ? -1 : next(name);
  int failure = refused ? error_number : errno;
  if (!result) note('U', name, 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  errno = failure;
  return result;
}

static int making(const char *name, int flags, int mode) {
  pthread_mutex_lock(&lock);
  int is_new = syscall(SYS_faccessat, AT_FDCWD, name, F_OK) != 0;
  int refused = is_new && strikes(-1, NULL, 0, 0);
  int result = refused ? -1 : (int)syscall(SYS_openat, AT_FDCWD, name, flags | O_LARGEFILE, mode);
  int failure = refused ? error_number : errno;
  if (is_new && result >= 0) note('C', name, 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  errno = failure;
  return result;
}

#define OPENING(function) \
  va_list rest; \
  va_start(rest, flags); \
  int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
  va_end(rest); \
  NEXT(function); \
  if ((flags & O_CREAT) && is_store(name)) return making(name, flags, mode); \
  return next(name, flags, mode)

int open(const char *name, int flags, ...) { OPENING(open); }

int open64(const char *name, int flags, ...) { OPENING(open64); }
