/* Containers: a single file or a directory becomes keys with bytes (SPEC section 4). Knows nothing of Zarr. */
#include "reader.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_ENTRIES ((uint64_t)1 << 20)
#define MAX_DIRECTORY_BYTES ((uint64_t)1 << 28)
#define MAX_NAME_BYTES 1024
#define TAIL_BYTES 98 /* the three end records */

uint64_t little_endian(const uint8_t *at, int n_bytes)
{
    uint64_t value = 0;
    while (n_bytes-- > 0)
        value = value << 8 | at[n_bytes];
    return value;
}

bool is_aligned(uint64_t value, uint64_t alignment)
{
    return value % alignment == 0;
}

static bool is_key(const char *name, size_t n)
{
    bool at_start = true;
    for (size_t i = 0; i < n; i++) {
        char c = name[i];
        bool inside = c == '.' || c == '-', first = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
        if (!first && (at_start || (!inside && c != '/')))
            return false;
        at_start = c == '/';
    }
    return !at_start && n <= MAX_NAME_BYTES;
}

static bool is_document(const char *key)
{
    const char *slash = strrchr(key, '/');
    return strcmp(slash == NULL ? key : slash + 1, "zarr.json") == 0;
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const Entry *)a)->key, ((const Entry *)b)->key);
}

static unsigned depth(const char *key)
{
    unsigned n = 0;
    while ((key = strchr(key, '/')) != NULL)
        n++, key++;
    return n;
}

/* ---- the single file ---- */

typedef struct {
    uint64_t n_entries, nbytes, offset;
} Directory;

static bool is_or_ones(const uint8_t *at, int n_bytes, uint64_t value)
{
    uint64_t stated = little_endian(at, n_bytes), ones = ((uint64_t)1 << 8 * n_bytes) - 1;
    return stated == value || stated == ones;
}

static Directory read_end(const uint8_t *file, uint64_t nbytes)
{
    require(nbytes >= 4 && little_endian(file, 4) == 0x04034b50, "FF-ZIP-1");
    require(nbytes >= TAIL_BYTES, "FF-ZIP-2");
    const uint8_t *end64 = file + nbytes - TAIL_BYTES, *locator = end64 + 56, *end = end64 + 76;
    require(little_endian(end64, 4) == 0x06064b50 && little_endian(end64 + 4, 8) == 44, "FF-ZIP-2");
    require(little_endian(locator, 4) == 0x07064b50 && little_endian(locator + 8, 8) == nbytes - TAIL_BYTES, "FF-ZIP-2");
    require(little_endian(end, 4) == 0x06054b50 && little_endian(end + 20, 2) == 0, "FF-ZIP-2");

    Directory directory = {little_endian(end64 + 32, 8), little_endian(end64 + 40, 8), little_endian(end64 + 48, 8)};
    require(little_endian(end64 + 12, 2) == 0x032d && little_endian(end64 + 14, 2) == 45, "FF-ZIP-3");
    require(little_endian(end64 + 16, 8) == 0 && little_endian(end64 + 24, 8) == directory.n_entries, "FF-ZIP-3");
    require(little_endian(locator + 4, 4) == 0 && little_endian(locator + 16, 4) == 1, "FF-ZIP-3");
    require(little_endian(end + 4, 4) == 0, "FF-ZIP-3");
    require(is_or_ones(end + 8, 2, directory.n_entries) && is_or_ones(end + 10, 2, directory.n_entries), "FF-ZIP-3");
    require(is_or_ones(end + 12, 4, directory.nbytes) && is_or_ones(end + 16, 4, directory.offset), "FF-ZIP-3");
    require(directory.n_entries <= MAX_ENTRIES, "FF-LIM-1");
    require(directory.nbytes <= MAX_DIRECTORY_BYTES, "FF-LIM-2");
    require(directory.nbytes <= nbytes - TAIL_BYTES, "FF-ZIP-4");
    require(directory.offset == nbytes - TAIL_BYTES - directory.nbytes, "FF-ZIP-4");
    require(directory.n_entries <= directory.nbytes / 46, "FF-ZIP-4");
    return directory;
}

/* Read a central entry of at most `n_left` bytes; returns its size, and the stated offset of its local header. */
static uint64_t read_central(Entry *entry, const uint8_t *central, uint64_t n_left, uint64_t *offset)
{
    require(n_left >= 46 && little_endian(central, 4) == 0x02014b50, "FF-ZIP-4");
    uint64_t n_name = little_endian(central + 28, 2), n_extra = little_endian(central + 30, 2);
    uint64_t n_comment = little_endian(central + 32, 2), nbytes = 46 + n_name + n_extra + n_comment;
    require(nbytes <= n_left, "FF-ZIP-4");
    const uint8_t *extra = central + 46 + n_name;

    require(little_endian(central + 4, 2) == 0x032d && little_endian(central + 6, 2) == 45, "FF-ZIP-5");
    require(little_endian(central + 8, 2) == 0x0800, "FF-ZIP-5");
    require(little_endian(central + 10, 2) == 0, "FF-ZIP-5");
    require(little_endian(central + 12, 2) == 0 && little_endian(central + 14, 2) == 0x0021, "FF-ZIP-5");
    require(n_comment == 0 && little_endian(central + 34, 2) == 0, "FF-ZIP-5");
    require(little_endian(central + 36, 2) == 0 && little_endian(central + 38, 4) == 0x81a40000, "FF-ZIP-5");

    require(little_endian(central + 20, 8) == UINT64_MAX && little_endian(central + 42, 4) == UINT32_MAX, "FF-ZIP-6");
    require(n_extra == 28 && little_endian(extra, 2) == 1 && little_endian(extra + 2, 2) == 24, "FF-ZIP-6");
    require(little_endian(extra + 4, 8) == little_endian(extra + 12, 8), "FF-ZIP-5");
    require(is_key((const char *)central + 46, n_name), "FF-ZIP-7");

    char *key = take(n_name + 1);
    memcpy(key, central + 46, n_name);
    entry->key = key;
    entry->is_document = is_document(key);
    entry->crc32 = (uint32_t)little_endian(central + 16, 4);
    entry->nbytes = little_endian(extra + 4, 8);
    *offset = little_endian(extra + 20, 8);
    return nbytes;
}

/* Compare a local header, `n_left` bytes before the central directory, with its central entry; returns its size. */
static uint64_t read_local(const Entry *entry, const uint8_t *local, uint64_t at, uint64_t n_left, const uint8_t *central)
{
    require(n_left >= 30, "FF-ZIP-11");
    require(little_endian(local, 4) == 0x04034b50, "FF-ZIP-9");
    require(memcmp(local + 4, central + 6, 24) == 0, "FF-ZIP-9"); /* version needed to length of the name */
    uint64_t n_name = little_endian(local + 26, 2), n_extra = little_endian(local + 28, 2);
    uint64_t nbytes = 30 + n_name + n_extra;
    require(nbytes <= n_left, "FF-ZIP-11");
    require(memcmp(local + 30, entry->key, n_name) == 0, "FF-ZIP-9");

    const uint8_t *extra = local + 30 + n_name;
    require(n_extra >= 26 && little_endian(extra, 2) == 1 && little_endian(extra + 2, 2) == 16, "FF-ZIP-10");
    require(little_endian(extra + 20, 2) == 0xd935 && little_endian(extra + 22, 2) == n_extra - 24, "FF-ZIP-10");
    for (uint64_t i = 26; i < n_extra; i++)
        require(extra[i] == 0, "FF-ZIP-10");
    require(little_endian(extra + 4, 8) == entry->nbytes && little_endian(extra + 12, 8) == entry->nbytes, "FF-ZIP-9");

    uint64_t alignment = little_endian(extra + 24, 2), n_padding = n_extra - 26;
    require(alignment > 0 && (alignment & (alignment - 1)) == 0, "FF-ALIGN-3");
    require(is_aligned(at + nbytes, alignment) && n_padding < alignment, "FF-ALIGN-3");
    return nbytes;
}

static void require_document_order(const Entry *entries, size_t n)
{
    require(n > 0 && strcmp(entries[0].key, "zarr.json") == 0, "FF-ZIP-12");
    for (size_t i = 1; i < n; i++) {
        if (!entries[i].is_document)
            continue;
        unsigned before = depth(entries[i - 1].key), here = depth(entries[i].key);
        require(entries[i - 1].is_document, "FF-ZIP-12");
        require(before < here || (before == here && strcmp(entries[i - 1].key, entries[i].key) <= 0), "FF-ZIP-12");
    }
}

static void read_zip(Container *container)
{
    const uint8_t *file = container->bytes;
    Directory directory = read_end(file, container->nbytes);
    Entry *entries = take((size_t)directory.n_entries * sizeof *entries);
    uint64_t at = 0, central = directory.offset, end = directory.offset + directory.nbytes;
    for (uint64_t i = 0; i < directory.n_entries; i++) {
        Entry *entry = &entries[i];
        uint64_t offset, here = central, n_left = directory.offset - at;
        central += read_central(entry, file + here, end - here, &offset);
        require(offset == at && entry->nbytes <= n_left, "FF-ZIP-11");
        entry->offset = at + read_local(entry, file + at, at, n_left, file + here);
        require(entry->nbytes <= directory.offset - entry->offset, "FF-ZIP-11");
        require(!entry->is_document || is_aligned(entry->offset, 64), "FF-ALIGN-2");
        at = entry->offset + entry->nbytes;
    }
    require(central == end, "FF-ZIP-4");
    require(at == directory.offset, "FF-ZIP-11");
    container->entries = entries;
    container->n_entries = (size_t)directory.n_entries;
    require_document_order(entries, container->n_entries);
    qsort(entries, container->n_entries, sizeof *entries, by_key);
    for (size_t i = 1; i < container->n_entries; i++)
        require(by_key(&entries[i - 1], &entries[i]) != 0, "FF-ZIP-8");
}

/* ---- the directory ---- */

typedef struct Found Found;
struct Found { /* a file, or a directory that is still to be listed */
    Found *next;
    const char *key; /* of the directory itself: "" */
    uint64_t nbytes;
};

typedef struct {
    Found *files, *directories;
    uint64_t n_entries, n_files;
} Listing;

static const char *joined(const char *left, const char *right)
{
    size_t n = strlen(left), n_right = strlen(right);
    char *path = take(n + 1 + n_right + 1);
    memcpy(path, left, n);
    if (n > 0 && n_right > 0)
        path[n++] = '/';
    memcpy(path + n, right, n_right);
    return path;
}

static void add_found(Listing *listing, const char *path, const char *key)
{
    struct stat status;
    require(++listing->n_entries <= MAX_ENTRIES, "FF-LIM-1");
    if (lstat(path, &status) != 0)
        give_up("cannot look at a file of the directory");
    require(S_ISREG(status.st_mode) || S_ISDIR(status.st_mode), "FF-DIR-2");
    require(is_key(key, strlen(key)), "FF-DIR-3");
    Found *found = take(sizeof *found), **list = S_ISDIR(status.st_mode) ? &listing->directories : &listing->files;
    *found = (Found){*list, key, (uint64_t)status.st_size};
    *list = found;
    listing->n_files += S_ISREG(status.st_mode);
}

static void list_directory(Listing *listing, const char *root, const char *key)
{
    const char *path = joined(root, key);
    uint64_t before = listing->n_entries;
    DIR *directory = opendir(path);
    if (directory == NULL)
        give_up("cannot list a directory");
    /* Names are copied first: a broken rule may not leave the directory open. */
    Found *names = NULL;
    struct dirent *item;
    uint64_t n_names = before;
    while (errno = 0, (item = readdir(directory)) != NULL && n_names <= MAX_ENTRIES) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0)
            continue;
        Found *name = take(sizeof *name);
        *name = (Found){names, joined(item->d_name, ""), 0};
        names = name;
        n_names++;
    }
    int error = errno;
    closedir(directory);
    if (item == NULL && error != 0)
        give_up("cannot list a directory");
    require(names != NULL || *key == 0, "FF-DIR-3");
    for (; names != NULL; names = names->next)
        add_found(listing, joined(path, names->key), joined(key, names->key));
}

static void read_directory(Container *container)
{
    Listing listing = {NULL, NULL, 0, 0};
    list_directory(&listing, container->path, "");
    while (listing.directories != NULL) {
        const char *key = listing.directories->key;
        listing.directories = listing.directories->next;
        list_directory(&listing, container->path, key);
    }
    container->entries = take((size_t)listing.n_files * sizeof *container->entries);
    for (Found *file = listing.files; file != NULL; file = file->next) {
        Entry *entry = &container->entries[container->n_entries++];
        entry->key = file->key;
        entry->nbytes = file->nbytes;
        entry->is_document = is_document(file->key);
    }
    qsort(container->entries, container->n_entries, sizeof *container->entries, by_key);
    require(find_entry(container, "zarr.json") != NULL, "FF-DIR-1");
}

/* ---- both ---- */

void open_container(Container *container, const char *path)
{
    struct stat status;
    *container = (Container){.path = path};
    if (stat(path, &status) != 0)
        give_up("cannot find the model");
    container->is_directory = S_ISDIR(status.st_mode);
    if (container->is_directory) {
        read_directory(container);
    } else {
        if (!S_ISREG(status.st_mode))
            give_up("the model is neither a file nor a directory");
        container->nbytes = (uint64_t)status.st_size;
        container->bytes = map_file(path, container->nbytes, true);
        read_zip(container);
    }
}

Entry *find_entry(const Container *container, const char *key)
{
    Entry wanted = {.key = key};
    if (container->n_entries == 0)
        return NULL;
    return bsearch(&wanted, container->entries, container->n_entries, sizeof wanted, by_key);
}

const uint8_t *entry_bytes(const Container *container, const Entry *entry)
{
    if (container->is_directory)
        return map_file(joined(container->path, entry->key), entry->nbytes, false);
    return container->bytes + entry->offset;
}
